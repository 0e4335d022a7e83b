"""`metrics.jsonl` and the callbacks: the same lines, written to the file and passed to each callback."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import StopRun
from fst_optimizer.store.files import sync, writing
from fst_optimizer.types import Candidate, Rollout, RolloutCounts

if TYPE_CHECKING:
    from fst_optimizer.evolve.round import FastRound
    from fst_optimizer.rollout.credit import Credit
    from fst_optimizer.run.state import ValidationScore
    from fst_optimizer.train.trainer import StepReport

Callback = Callable[[Mapping[str, Any]], None]
"""Receives every line of `metrics.jsonl`, and `{"kind": "progress", "phase", "done", "total", ...}` in between.

It may raise `StopRun`: the run then ends after the phase that is under way."""


class MetricsLog:
    """Appends lines with the fields that all of them share, and tells the callbacks of each."""

    def __init__(self, path: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.path = path
        self.callbacks = tuple(callbacks)
        self.stop_asked = False
        """Whether a callback wants the run to end."""
        self._started = time.monotonic()

    @property
    def time_s(self) -> float:
        """Seconds since the run started, across resumes."""
        return round(time.monotonic() - self._started, 3)

    def line(
        self, kind: str, *, cycle: int, step: int, policy_version: int, rollouts: RolloutCounts, **fields: Any
    ) -> None:
        """Append one line and tell the callbacks. Numbers that are not finite become null, as JSON has none."""
        data = {
            "kind": kind,
            "cycle": cycle,
            "step": step,
            "policy_version": policy_version,
            "time_s": self.time_s,
            "rollouts": rollouts.to_json(),
            **{name: _finite(value) for name, value in fields.items()},
        }
        with writing(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
        self._tell(data)

    def counting(self, phase: str, total: int) -> Callable[[Rollout], None]:
        """Called with each rollout of a phase as it ends: tells the callbacks, and writes nothing."""
        done = itertools.count(1)

        def count(rollout: Rollout) -> None:
            event = {"kind": "progress", "phase": phase, "done": next(done), "total": total}
            self._tell({**event, "example": rollout.example_id, "score": rollout.score})

        return count

    def size(self) -> int:
        """Bytes written so far, safe on disk; a checkpoint keeps it, so that a resume can cut what came after."""
        if not self.path.exists():
            return 0
        with writing(self.path):
            sync(self.path)
        return self.path.stat().st_size

    def resume(self, size: int, elapsed_s: float) -> None:
        """Go on from a checkpoint: forget the lines after it, and count the seconds that the run has taken."""
        self._started = time.monotonic() - elapsed_s
        with writing(self.path), self.path.open("a") as handle:
            handle.truncate(min(size, self.path.stat().st_size))

    def _tell(self, data: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            try:
                callback(data)
            except StopRun:
                self.stop_asked = True


def fast_fields(found: FastRound) -> dict[str, Any]:
    """What a `fast` line has besides the fields that all lines share."""
    return {
        "proposals": found.proposals,
        "accepted": found.accepted,
        "population": len(found.population.candidates),
        "best_score": found.best_score,
        "frontier": len(found.frontier),
        "reused": found.reused,
    }


def eval_fields(candidate: Candidate, found: ValidationScore) -> dict[str, Any]:
    """What an `eval` line of the validation set has."""
    return {
        "split": "val",
        "score": found.score,
        "kl_to_base": found.kl_to_base,
        "candidate": candidate.id,
        "failed": found.failed,
    }


def step_fields(rollouts: Sequence[Rollout], credited: Credit, report: StepReport, step_s: float) -> dict[str, Any]:
    """What a `step` line has. `step_s`: seconds from the last rollout to the published version."""
    return {
        "reward_mean": credited.reward_mean,
        "groups": credited.groups,
        "flat_groups": credited.flat_groups,
        "calls": sum(len(rollout.calls) for rollout in rollouts),
        "tokens": sum(rollout.tokens for rollout in rollouts),
        "updated": report.updated,
        "failed": sum(rollout.outcome != "ok" for rollout in rollouts),
        "grad_norm": report.grad_norm,
        "ratio_mean": report.ratio_mean,
        "clipped_share": report.clipped_share,
        "entropy": report.entropy,
        "advantage_delta": report.advantage_delta,
        "lr": report.lr,
        "step_s": round(step_s, 3),
        "note": report.reason,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
