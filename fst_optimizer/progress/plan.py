"""What a run has before it, by its settings and the sizes of its data. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig, Method

NO_CAP = 1 << 62
MOST_CYCLES = 2000
"""A run of more cycles ends by another cap: its end is not looked for."""


@dataclass(frozen=True)
class Plan:
    """What the settings ask for. None: no cap."""

    method: Method
    cycles: int
    steps_per_cycle: int
    fast_rollouts: int
    """Most of one fast round."""
    anchor: int
    """Fewest that a fast round needs."""
    step_rollouts: int
    eval_rollouts: int
    """One validation, the rollouts for the KL included."""
    test_rollouts: int
    search_rollouts: int | None = None
    """Most of all fast rounds together, where the method says so."""
    searches_first: bool = False
    """Whether no slow step comes before the last fast round."""
    max_rollouts: int | None = None
    max_steps: int | None = None
    max_time_s: float | None = None
    may_end_early: bool = False
    """Whether patience, tokens, dollars or the end of the search may end the run before all of this is done."""

    @classmethod
    def of(cls, config: FSTConfig, *, val: int, test: int, teachers: int = 0) -> Plan:
        """For data of these sizes."""
        val = min(val, config.eval.max_examples or val)
        budget, rollout = config.budget, config.rollout
        return cls(
            method=config.method,
            cycles=budget.max_cycles,
            steps_per_cycle=config.train.steps_per_cycle,
            fast_rollouts=config.fast.max_rollouts,
            anchor=config.fast.anchor_size,
            step_rollouts=rollout.batch_size * (rollout.group_size + teachers * rollout.teacher_rollouts),
            eval_rollouts=config.eval.candidates * (val + min(val, config.eval.kl_examples)),
            test_rollouts=test,
            search_rollouts=config.search_rollouts,
            searches_first=config.searches_first,
            max_rollouts=budget.max_rollouts,
            max_steps=budget.max_steps,
            max_time_s=budget.max_time_s,
            may_end_early=config.method == "gepa"
            or config.adapts
            or any(cap is not None for cap in (budget.patience, budget.max_tokens, budget.max_cost_usd)),
        )

    @property
    def endless(self) -> bool:
        """Whether the cycles are too many to be meant."""
        return self.cycles > MOST_CYCLES and self.max_rollouts is None and self.max_steps is None

    def stage(self, number: int) -> str:
        """The work of a phase, by its number in a cycle; 0 is what comes before the first cycle."""
        if number == 0:
            return "first eval"
        if number <= 2:
            return ("fast", "eval of prompts")[number - 1]
        return "slow" if number < 3 + self.steps_per_cycle else "eval of weights"

    def rollouts(self, stage: str) -> int:
        """How many a phase of this kind runs at most."""
        by_stage = {"fast": self.fast_rollouts, "slow": self.step_rollouts, "test": self.test_rollouts}
        return by_stage.get(stage, self.eval_rollouts)


@dataclass(frozen=True)
class Position:
    """Where a run is: the phase that is under way, or comes next."""

    cycle: int = 0
    """Cycles done."""
    number: int = 0
    """Of the phase, in its cycle. 0: before the first cycle."""
    stage: str = "first eval"
    step: int = 0
    """Slow steps done."""
    training: int = 0
    """Fast and slow rollouts spent before this phase."""
    over: bool = False
    """Whether no cycle follows, whatever the settings say."""
    search_over: bool = False
    """Whether no fast round follows."""


def stages_left(plan: Plan, at: Position, fast_rollouts: float | None = None) -> Iterator[str]:
    """The phases that are left to the run's end, this one first; those that the method or a cap leaves out are not.

    `fast_rollouts`: what a fast round takes, where that is known better than by the settings.
    """
    fast_size = plan.fast_rollouts if fast_rollouts is None else fast_rollouts
    training, step = float(at.training), at.step
    if at.number == 0:
        yield at.stage
        if at.over:
            return
        if plan.test_rollouts and at.stage == "first eval":
            yield "test"
    cap = NO_CAP if plan.max_rollouts is None else plan.max_rollouts
    fast_cap = cap if plan.search_rollouts is None else min(cap, plan.search_rollouts)
    for cycle in range(at.cycle, min(plan.cycles, at.cycle + MOST_CYCLES)):
        first = max(1, at.number) if cycle == at.cycle else 1
        capped = False
        for number in range(first, plan.steps_per_cycle + 4):
            stage = plan.stage(number)
            pays_fast = plan.method != "rl" and not at.search_over and training + plan.anchor <= fast_cap
            if stage == "fast":
                if not pays_fast and plan.method == "gepa":
                    capped = True
                    break
                if not pays_fast:
                    continue
                training += min(fast_size, fast_cap - training)
            elif stage == "slow":
                if plan.method == "gepa" or (plan.searches_first and pays_fast):
                    continue
                capped = capped or training + plan.step_rollouts > cap or step >= (plan.max_steps or NO_CAP)
                if capped:
                    continue
                training, step = training + plan.step_rollouts, step + 1
            yield stage
        if capped or step >= (plan.max_steps or NO_CAP):
            break
    if plan.test_rollouts:
        yield "test"


def steps_planned(plan: Plan, at: Position, fast_rollouts: float | None = None) -> int | None:
    """Slow steps of the whole run, those done included; None where no end is in sight."""
    if plan.endless:
        return None
    return at.step + sum(stage == "slow" for stage in stages_left(plan, at, fast_rollouts))
