"""`metrics.jsonl` and the callbacks: the same lines, written to the file and passed to each callback."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import StopRun
from fst_optimizer.store.files import sync, writing
from fst_optimizer.types import Candidate, Rollout, RolloutCounts

if TYPE_CHECKING:
    from fst_optimizer.config.rollout import RolloutConfig
    from fst_optimizer.evolve.round import FastRound
    from fst_optimizer.evolve.search import Accepted
    from fst_optimizer.progress.plan import Plan
    from fst_optimizer.rollout.credit import Credit
    from fst_optimizer.rollout.gather import Gathered
    from fst_optimizer.run.state import State, ValidationScore
    from fst_optimizer.train.report import StepReport

logger = logging.getLogger(__name__)

UNREADABLE = "metrics.damaged.jsonl"
"""Where lines go that damage made unreadable."""

Callback = Callable[[Mapping[str, Any]], None]
"""Receives every line of `metrics.jsonl`, and events of other kinds that are not written down.

- `plan`: what a new run may spend at most, in words (`text`), where it made its dry run;
- `start`: the run begins, or goes on, from the state that is told (`start_fields`);
- `phase`: a phase begins: `phase` (fast, eval, slow or test), `cycle`, `number` in it, `step`;
- `progress`: a rollout of a phase ended: `phase`, `done`, `total`, `example`, `score`, `outcome`, `tokens`;
- `accepted`: the fast round took a proposal in: `before` and `after` by component, its mean on the anchor.

All have `time_s`. The callback may raise `StopRun`: the run then ends after the phase that is under way."""


class MetricsLog:
    """Appends lines with the fields that all of them share, and tells the callbacks of each."""

    def __init__(self, path: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.path = path
        self.callbacks = tuple(callbacks)
        self.stop_asked = False
        """Whether a callback wants the run to end."""
        self._started = time.monotonic()
        self._size = 0
        self._hash = hashlib.sha256()
        """Of all bytes written, so that a checkpoint need not read them again."""

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
        text = json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"
        # Text that is no Unicode (a file's name in an error) becomes an escape, which JSON reads too.
        written = text.encode("utf-8", "backslashreplace")
        with writing(self.path), self.path.open("ab") as handle:
            handle.write(written)
        self._size += len(written)
        self._hash.update(written)
        self._pass_on(data)

    def tell(self, kind: str, **fields: Any) -> None:
        """Tell the callbacks of something that is not written down."""
        self._pass_on({"kind": kind, "time_s": self.time_s, **fields})

    def counting(self, phase: str, total: int) -> Callable[[Rollout], None]:
        """Called with each rollout of a phase as it ends: tells the callbacks, and writes nothing."""
        done = itertools.count(1)

        def count(rollout: Rollout) -> None:
            self.tell(
                "progress",
                phase=phase,
                done=next(done),
                total=total,
                example=rollout.example_id,
                score=rollout.score,
                outcome=str(rollout.outcome),
                tokens=rollout.tokens,
            )

        return count

    def sync(self) -> tuple[int, str]:
        """Bytes written so far and their SHA-256, safe on disk: what a checkpoint keeps, so that a resume can tell."""
        if self._size:
            with writing(self.path):
                sync(self.path)
        return self._size, self._hash.hexdigest()

    def resume(self, size: int, sha256: str | None, *, saved_s: float, elapsed_s: float) -> None:
        """Go on from a checkpoint: forget the lines after it, and count the seconds that the run has taken.

        `size` and `sha256` are the checkpoint's, `saved_s` is when it was written. A file that is not as it was then
        cannot be made again: what is left of it stays, and a warning says so.
        """
        self._started = time.monotonic() - elapsed_s
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[:size]
        if len(kept) < size or (sha256 is not None and hashlib.sha256(kept).hexdigest() != sha256):
            kept = self._save_what_is_left(content, size, saved_s)
            with writing(self.path):
                temporary = self.path.with_name(f".{self.path.name}.tmp")
                temporary.write_bytes(kept)
                sync(temporary)
                os.replace(temporary, self.path)
        with writing(self.path), self.path.open("ab") as handle:
            handle.truncate(len(kept))
        self._size, self._hash = len(kept), hashlib.sha256(kept)

    def _save_what_is_left(self, content: bytes, size: int, saved_s: float) -> bytes:
        """The lines of a damaged file that can be read and were there when the checkpoint was written."""
        left, unreadable = [], []
        for line in content.splitlines(keepends=True):
            written_s = _time_of(line)
            if written_s is None:
                unreadable.append(line.rstrip(b"\n") + b"\n")
            elif written_s <= saved_s:
                left.append(line)
        kept = b"".join(left)
        if unreadable:
            with writing(self.path.with_name(UNREADABLE)), self.path.with_name(UNREADABLE).open("ab") as handle:
                handle.writelines(unreadable)
        logger.warning(
            "%s is damaged: %d bytes of %d are left, in %d lines; the run goes on, as nothing is learned from them, "
            "but what they said is lost or wrong%s",
            self.path.name,
            len(kept),
            size,
            len(left),
            f" (what cannot be read is in {UNREADABLE})" if unreadable else "",
        )
        return kept

    def _pass_on(self, data: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            try:
                callback(data)
            except StopRun:
                self.stop_asked = True


def start_fields(run_dir: Path, state: State, plan: Plan, *, resumed: bool) -> dict[str, Any]:
    """What a `start` event has: what is known of the run before this process does anything. None: not yet."""
    validated = max(state.validated.values(), key=lambda one: one.policy_version, default=None)
    return {
        "run_dir": str(run_dir),
        "resumed": resumed,
        "cycle": state.cycle,
        "step": state.step,
        "policy_version": state.policy_version,
        "rollouts": state.rollouts.to_json(),
        "search_over": bool(state.search_over),
        "tokens": state.tokens,
        "outcomes": dict(state.tally.outcomes),
        "reward_mean": state.watch.rewards[-1] if state.watch.rewards else None,
        "val_score_before": state.val_score_before if state.started else None,
        "best": _finite(state.best.score),
        "score": validated.score if validated else None,
        "kl_to_base": validated.kl_to_base if validated else state.best.kl_to_base,
        "plan": asdict(plan),
    }


def fast_fields(found: FastRound) -> dict[str, Any]:
    """What a `fast` line has besides the fields that all lines share."""
    return {
        "proposals": found.proposals,
        "accepted": found.accepted,
        "population": len(found.population.candidates),
        "best_score": found.best_score,
        "frontier": len(found.frontier),
        "reused": found.reused,
        "lost": found.lost,
        "note": found.notes[-1],
    }


def accepted_fields(accepted: Accepted) -> dict[str, Any]:
    """What an `accepted` event has: the texts that changed, and scores on the anchor."""
    old, new = accepted.parent.texts, accepted.candidate.texts
    changed = [name for name in new if new[name] != old[name]]
    return {
        "candidate": accepted.candidate.id,
        "parent": accepted.parent.id,
        "before": {name: old[name] for name in changed},
        "after": {name: new[name] for name in changed},
        "score": accepted.score,
        "parent_score": accepted.parent_score,
    }


def eval_fields(candidate: Candidate, found: ValidationScore) -> dict[str, Any]:
    """What an `eval` line of the validation set has."""
    return {
        "split": "val",
        "score": found.score,
        "kl_to_base": found.kl_to_base,
        "candidate": candidate.id,
        "failed": found.failed,
        "lost": found.lost,
    }


def step_fields(rollouts: Sequence[Rollout], credited: Credit, report: StepReport, step_s: float) -> dict[str, Any]:
    """What a `step` line has. `step_s`: seconds from the last rollout to the published version."""
    return {
        "reward_mean": credited.reward_mean,
        "groups": credited.groups,
        "flat_groups": credited.flat_groups,
        "mixed_groups": mixed_groups(rollouts),
        "greedy_calls": sum(credited.greedy.values()),
        "calls": sum(len(rollout.calls) for rollout in rollouts),
        "tokens": sum(rollout.tokens for rollout in rollouts),
        "updated": report.updated,
        "epochs": report.epochs,
        "failed": sum(rollout.outcome != "ok" for rollout in rollouts),
        "grad_norm": report.grad_norm,
        "ratio_mean": report.ratio_mean,
        "ratio_max": report.ratio_max,
        "clipped_share": report.clipped_share,
        "entropy": report.entropy,
        "entropy_coef": report.entropy_coef,
        "advantage_delta": report.advantage_delta,
        "lr": report.lr,
        "kl_to_last": report.kl_to_last,
        "step_s": round(step_s, 3),
        "note": "every group was flat or its calls greedy" if credited.greedy and not credited.rows else report.reason,
    }


def group_fields(found: Gathered, config: RolloutConfig) -> dict[str, Any]:
    """What a `step` line has of groups that were not just run; its other fields are of the rollouts that were."""
    halves = config.stop_flat or config.refill > 0
    return {
        "mixed_groups": mixed_groups(found.rollouts),
        **({"given_up": found.given_up, "refilled": found.refilled} if halves else {}),
        **({"reused": found.reused} if config.reuse != "none" else {}),
    }


def mixed_groups(rollouts: Sequence[Rollout]) -> int:
    """Examples whose rollouts were made under more than one candidate's instructions."""
    candidates: dict[str, set[str]] = {}
    for rollout in rollouts:
        candidates.setdefault(rollout.example_id, set()).add(rollout.candidate_id)
    return sum(len(found) > 1 for found in candidates.values())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time_of(line: bytes) -> float | None:
    """When a whole line was written, in seconds since the run's start; None where it is not one."""
    try:
        return float(json.loads(line)["time_s"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`."""
    # Not splitlines, for which U+2028 inside a text would end a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
