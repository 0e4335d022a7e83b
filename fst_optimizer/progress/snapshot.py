"""What is known of a run at one moment: a fold over the lines of `metrics.jsonl` and the events in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fst_optimizer.progress.estimate import Left, Pace, time_left
from fst_optimizer.progress.plan import Plan, Position, steps_planned
from fst_optimizer.text import clock, plain
from fst_optimizer.types import RolloutCounts

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment."""

    run_dir: str = ""
    plan: Plan | None = None
    waiting: str = ""
    """What the run waits for before anything else, e.g. a server that starts."""
    phase: str = ""
    """What is under way: fast, slow, eval, kl or test."""
    done: int = 0
    """Rollouts of this phase that ended."""
    total: int = 0
    at: Position = field(default_factory=Position)
    pace: Pace = field(default_factory=Pace)
    time_s: float = 0.0
    """Seconds since the run's start when the last event came."""
    step: int = 0
    """Slow steps done."""
    reward: float | None = None
    frontier: int | None = None
    val_first: float | None = None
    val_score: float | None = None
    val_best: float | None = None
    kl: float = 0.0
    rollouts: RolloutCounts = field(default_factory=RolloutCounts)
    tokens: int = 0
    """Sampled from the policy."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Outcome -> rollouts that ended so."""

    @property
    def failed(self) -> int:
        """Rollouts whose outcome was not `ok`."""
        return sum(count for outcome, count in self.outcomes.items() if outcome != "ok")

    @property
    def steps(self) -> int | None:
        """Slow steps of the whole run, as far as the settings say; None where they do not."""
        return None if self.plan is None else steps_planned(self.plan, self.at, self.pace.mean_rollouts("fast"))

    def left(self, now_s: float) -> Left | None:
        """What is left to the end; None while that is unknown."""
        return None if self.plan is None else time_left(self.plan, self.at, self.pace, now_s)


def advance(before: Snapshot, event: Event) -> Snapshot:
    """The snapshot after one event; kinds that are not known here change nothing."""
    kind = event["kind"]
    if kind == "waiting":
        return replace(before, waiting=f"starting vLLM, {clock(event['seconds'])}: {plain(event['text'])[:90]}")
    fold = _FOLDS.get(kind)
    return replace(before if fold is None else fold(before, event), waiting="", time_s=event["time_s"])


def _started(before: Snapshot, event: Event) -> Snapshot:
    counts = RolloutCounts(**event["rollouts"])
    return replace(
        before,
        run_dir=event["run_dir"],
        plan=Plan(**event["plan"]),
        at=Position(
            cycle=event["cycle"],
            step=event["step"],
            training=counts.training,
            search_over=event.get("search_over", False),
        ),
        pace=Pace(began_s=event["time_s"], partial=event["resumed"]),
        step=event["step"],
        reward=event["reward_mean"],
        val_first=event["val_score_before"],
        val_score=event["score"],
        val_best=event["best"],
        kl=event["kl_to_base"],
        rollouts=counts,
        tokens=event["tokens"],
        outcomes=event["outcomes"],
    )


def _phase(before: Snapshot, event: Event) -> Snapshot:
    name, number = event["phase"], event["number"]
    stage = "test" if name == "test" else before.plan.stage(number) if before.plan else name
    flags = (event.get("over", False), event.get("search_over", False))
    at = Position(event["cycle"], number, stage, event["step"], before.rollouts.training, *flags)
    pace = before.pace
    if pace.partial and not before.phase:  # a resumed run comes to the phase that was under way
        pace = replace(pace, began_s=event["time_s"])
    else:
        pace = pace.ended(before.at.stage, event["time_s"])
    return replace(before, phase=name, done=0, total=0, step=event["step"], at=at, pace=pace)


def _progress(before: Snapshot, event: Event) -> Snapshot:
    outcome = event.get("outcome", "ok")
    return replace(
        before,
        phase=event["phase"],
        done=event["done"],
        total=event["total"],
        pace=before.pace.counted(),
        rollouts=before.rollouts.plus(**{_COUNTED.get(event["phase"], "eval"): 1}),
        tokens=before.tokens + event.get("tokens", 0),
        outcomes={**before.outcomes, outcome: before.outcomes.get(outcome, 0) + 1},
    )


def _line(before: Snapshot, event: Event) -> Snapshot:
    """A line of `metrics.jsonl`."""
    return replace(before, rollouts=RolloutCounts(**event["rollouts"]), step=event["step"])


def _fast(before: Snapshot, event: Event) -> Snapshot:
    return replace(_line(before, event), frontier=event.get("frontier", event["population"]))


def _step(before: Snapshot, event: Event) -> Snapshot:
    return replace(_line(before, event), reward=event["reward_mean"])


def _eval(before: Snapshot, event: Event) -> Snapshot:
    score = event["score"]
    first = score if before.val_first is None else before.val_first
    best = score if before.val_best is None else max(score, before.val_best)
    return replace(_line(before, event), val_first=first, val_score=score, val_best=best, kl=event["kl_to_base"])


_COUNTED = {"fast": "fast", "slow": "slow"}
"""Phase -> what its rollouts count as until the next line has the exact numbers; all others are evaluations."""

_FOLDS = {
    "start": _started,
    "phase": _phase,
    "progress": _progress,
    "fast": _fast,
    "step": _step,
    "eval": _eval,
}
