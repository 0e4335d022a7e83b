"""The bounded sample of a cycle's rollouts that is written down for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fst_optimizer.store.files import RunFiles, writing
from fst_optimizer.types import Rollout

ROLLOUTS_KEPT = 32
"""Most rollouts of a cycle in its file."""


def keep_rollouts(files: RunFiles, cycle: int, rollouts: Sequence[Rollout]) -> None:
    """Write some rollouts of a cycle down, those that failed or scored least first.

    Raises:
        StorageError: They could not be written.
    """
    path = files.rollouts(cycle)
    worst_first = sorted(rollouts, key=lambda rollout: (rollout.outcome == "ok", rollout.score))
    lines = [json.dumps(_readable(rollout), ensure_ascii=False) + "\n" for rollout in worst_first[:ROLLOUTS_KEPT]]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _readable(rollout: Rollout) -> dict[str, object]:
    """A rollout as people read it: texts, not token ids."""
    return {
        "candidate": rollout.candidate_id,
        "example": rollout.example_id,
        "policy_version": rollout.policy_version,
        "outcome": str(rollout.outcome),
        "score": rollout.score,
        "error": rollout.error,
        "calls": [
            {"predictor": call.predictor, "text": call.text, "tokens": len(call.completion_ids)}
            for call in rollout.calls
        ],
    }
