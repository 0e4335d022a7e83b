"""How long a run will still take: its phases left, at what such phases have taken in this process. Pure functions.

A phase that has been done before is expected to take the mean of those; one that has not, as long as its rollouts take
at the pace of all others. So the estimate of the whole changes when a phase takes longer than its kind did, and not
when a phase ends; a share of steps or rollouts done would jump at every fast round and every validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fst_optimizer.progress.plan import Plan, Position, stages_left


@dataclass(frozen=True)
class Pace:
    """What phases took in this process, and how far the one under way is."""

    phases: Mapping[str, tuple[int, float, int]] = field(default_factory=dict)
    """Stage -> phases done, their seconds, their rollouts."""
    began_s: float = 0.0
    """When the phase under way began."""
    rollouts: int = 0
    """Its rollouts that have ended."""
    partial: bool = False
    """Whether it began in an earlier process, so that its seconds say nothing."""

    def ended(self, stage: str, now_s: float) -> Pace:
        """After the phase under way, which was of this stage."""
        phases = dict(self.phases)
        # A fast round or a step without rollouts was left out by a cap; an evaluation without is one already known.
        if not self.partial and (self.rollouts or "eval" in stage):
            count, seconds, rollouts = phases.get(stage, (0, 0.0, 0))
            phases[stage] = (count + 1, seconds + now_s - self.began_s, rollouts + self.rollouts)
        return Pace(phases, began_s=now_s)

    def counted(self) -> Pace:
        """After one more rollout."""
        return replace(self, rollouts=self.rollouts + 1)

    def mean_rollouts(self, stage: str) -> float | None:
        """What phases of this stage ran; None before the first."""
        count, _, rollouts = self.phases.get(stage, (0, 0.0, 0))
        return rollouts / count if count else None


@dataclass(frozen=True)
class Left:
    """Seconds to the end of the run."""

    seconds: float
    sure: bool
    """Whether every kind of phase that is left has been measured."""


def time_left(plan: Plan, at: Position, pace: Pace, now_s: float) -> Left | None:
    """What is left at `now_s`, seconds since the run's start. None: the run's main work has not been measured yet."""
    if ("slow" if plan.method in ("fst", "rl") else "fast") not in pace.phases and "slow" not in pace.phases:
        return None
    fast = pace.mean_rollouts("fast")
    here, *ahead = [*stages_left(plan, at, fast)] or [""]
    expected = {stage: _expected(plan, pace, stage, now_s) for stage in {here, *ahead}}
    if not here or None in expected.values():
        return None
    known = {stage: seconds for stage, seconds in expected.items() if seconds is not None}
    seconds = _running(plan, pace, here, known[here], now_s) + sum(known[stage] for stage in ahead)
    if plan.max_time_s is not None:
        final = known.get("test", 0.0) if ahead else 0.0
        seconds = min(seconds, max(0.0, plan.max_time_s - now_s) + final)
    elif plan.endless:
        return None
    return Left(seconds, all(stage in pace.phases for stage in ahead))


def _expected(plan: Plan, pace: Pace, stage: str, now_s: float) -> float | None:
    """Seconds of a whole phase."""
    count, seconds, _ = pace.phases.get(stage, (0, 0.0, 0))
    if count:
        return seconds / count
    here = (0.0, 0) if pace.partial else (now_s - pace.began_s, pace.rollouts)
    spent, rollouts = map(sum, zip(here, *((one[1], one[2]) for one in pace.phases.values()), strict=True))
    return plan.rollouts(stage) * spent / rollouts if rollouts else None


def _running(plan: Plan, pace: Pace, stage: str, expected_s: float, now_s: float) -> float:
    """Seconds left of the phase under way: at first by what it was expected to take, later by its own pace."""
    passed_s, total = now_s - pace.began_s, pace.mean_rollouts(stage) or plan.rollouts(stage)
    by_plan = max(0.0, expected_s - passed_s)
    share = min(1.0, pace.rollouts / total) if total else 0.0
    if not share:
        return by_plan
    return (1 - share) * by_plan + share * (passed_s / share - passed_s)
