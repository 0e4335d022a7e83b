"""What a method's cycle has, and what the budget leaves for it. Pure functions of the settings and the state.

The methods are one cycle with parts left out, so that comparing them compares the methods: `rl` has no fast rounds,
`gepa` no slow steps; `sequential` and `once` have fast rounds until so many rollouts are spent (half of the run's, or
`fast.once_rollouts`), then slow steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import batch_at
from fst_optimizer.run.state import State, Stream
from fst_optimizer.types import Item, Population

if TYPE_CHECKING:
    from fst_optimizer.evolve.round import FastRound

NO_CAP = 1 << 62
"""Rollouts left where the run has no cap on them."""
BARREN_ROUNDS = 2
MOST_TRIED = 5000
"""Candidates that a search remembers as tried."""


def has_fast_round(config: FSTConfig, state: State) -> bool:
    """Whether this cycle evolves prompts: the search is not over, and one candidate on the anchor can be paid for."""
    if config.method == "rl" or state.search_over:
        return False
    return fast_rollouts_left(config, state) >= config.fast.anchor_size


def has_slow_steps(config: FSTConfig, state: State) -> bool:
    """Whether this cycle updates the weights."""
    if config.searches_first:
        return not has_fast_round(config, state)
    return config.method in ("fst", "rl") and not (state.stream and state.stream.hurry)


def trained_population(config: FSTConfig, state: State) -> Population:
    """The candidates under whose prompts the weights are trained: after a search it is the best one alone."""
    if not config.searches_first:
        return state.population
    return Population((state.best.candidate,), state.policy_version)


def rollouts_left(config: FSTConfig, state: State) -> int:
    """Fast and slow rollouts that the run, or the stage of a stream, may still spend."""
    cap = config.budget.max_rollouts
    if state.stream and config.budget.stage_rollouts:
        cap = (state.stream.stage + 1) * config.budget.stage_rollouts
    return NO_CAP if cap is None else max(0, cap - state.rollouts.training)


def fast_rollouts_left(config: FSTConfig, state: State) -> int:
    """Rollouts that fast rounds may still spend: no more than the method has for prompts."""
    own = NO_CAP if config.search_rollouts is None else config.search_rollouts
    before = state.stream.searched if state.stream else 0
    return max(0, min(rollouts_left(config, state), own - (state.rollouts.fast - before)))


def reflections_left(config: FSTConfig, state: State) -> int | None:
    """Reflections that the run may still make. None: no cap."""
    most = config.fast.reflection_calls
    return None if most is None else most - state.reflection_calls


def cap_before_step(config: FSTConfig, state: State, rollouts: int) -> str:
    """The name of the cap that a slow step of so many rollouts would pass; "" when there is none."""
    most = config.budget.max_steps
    if most is not None and state.step >= most:
        return "max_steps"
    return "max_rollouts" if rollouts > rollouts_left(config, state) else ""


def leaves_evaluation(state: State) -> bool:
    """Whether a cycle ends with an evaluation: caps on rollouts and steps leave room for one, other ends do not."""
    return not state.ended or state.cap in ("max_rollouts", "max_steps")


def next_cycle(config: FSTConfig, state: State) -> State:
    """The state before the next cycle, or the run's last one."""
    state = replace(state, cycle=state.cycle + 1, batch=state.batch + config.train.steps_per_cycle, phase=0)
    state = replace(state, kept=kept_versions(state, config.run.keep_versions))
    budget = config.budget
    if state.ended:
        return state
    if state.stream:
        state = next_stage(config, state, state.stream)
    if state.ended:
        return state
    if state.cycle >= budget.max_cycles:
        return replace(state, ended="done")
    if budget.patience is not None and state.watch.stale >= budget.patience:
        return replace(state, ended="stopped")
    if budget.max_steps is not None and state.step >= budget.max_steps:
        return replace(state, ended="budget", cap="max_steps")  # no fast round for steps that will not be taken
    if not has_fast_round(config, state) and not has_slow_steps(config, state):
        return replace(state, ended="done") if state.search_over else replace(state, ended="budget", cap="max_rollouts")
    return state


def kept_versions(state: State, most: int) -> dict[int, int]:
    """The ends of cycles whose versions are kept, now that a cycle is done: at most `most`, and the last one.

    They lie 1, 2, 4, ... cycles apart: the distance doubles where there would be more, so that none is missed that was
    removed before.
    """
    if not most:
        return {}
    apart = 1
    while state.cycle // apart > most:
        apart *= 2
    ends = {**state.kept, state.cycle: state.policy_version}
    return {cycle: version for cycle, version in ends.items() if cycle % apart == 0 or cycle == state.cycle}


def after_fast_round(config: FSTConfig, state: State, found: FastRound) -> State:
    """The state with what a fast round says of the next ones: whether the search for prompts is over.

    Only where they would run under the same weights; `fst` goes on in every cycle. One barren round proves little: its
    anchor may have been easy, a reflector that samples may have repeated itself. After `BARREN_ROUNDS` of them in a
    row, each on examples of its own, another one costs more than it finds. A round that tried new texts and rejected
    them all was unlucky, and counts for going on.
    """
    if config.method == "fst":
        return state
    barren = state.barren + 1 if found.outlook == "barren" else 0
    why = found.notes[-1].removeprefix("ended: ")
    over = f"nothing can be proposed any more ({why})" if found.outlook == "closed" else ""
    if barren >= BARREN_ROUNDS:
        over = f"nothing new to try in {barren} fast rounds in a row (the last ended: {why})"
    ids = (one.id for one in (*state.population.candidates, *found.population.candidates))
    tried = tuple(dict.fromkeys((*state.tried, *ids, *found.tried)))[-MOST_TRIED:]
    return replace(state, barren=barren, tried=() if over else tried, search_over=over)


def stage_over(config: FSTConfig, state: State) -> bool:
    """Whether a stage of a stream has no rollouts left for another step."""
    return rollouts_left(config, state) < config.rollout.batch_size * config.rollout.group_size


def next_stage(config: FSTConfig, state: State, stream: Stream) -> State:
    """The state before the next cycle of a stream: in the next stage where one is over, ended after the last one.

    Weights, population and optimizer go on; only validation scores on other examples are forgotten.
    """
    stream = replace(stream, hurry=False)
    if not stage_over(config, state):
        return replace(state, stream=stream)
    if stream.stage + 1 == stream.stages:
        return replace(state, stream=stream, ended="done")
    return replace(state, stream=replace(stream, stage=stream.stage + 1), validated={})


def next_batches(trainset: Sequence[Item], config: FSTConfig, first: int) -> list[tuple[Item, ...]]:
    """The T batches of a cycle, from batch number `first` of the data order on."""
    return [
        batch_at(trainset, first + offset, config.rollout.batch_size, config.seed)
        for offset in range(config.train.steps_per_cycle)
    ]


def draw_anchor(batches: Sequence[Sequence[Item]], config: FSTConfig, cycle: int) -> tuple[Item, ...]:
    """Examples to score candidates on, drawn from those that the cycle's batches will use."""
    pool = list({item.id: item for batch in batches for item in batch}.values())
    random.Random(f"anchor/{config.seed}/{cycle}").shuffle(pool)
    return tuple(pool[: config.fast.anchor_size])


@dataclass(frozen=True)
class RunSizes:
    """What a run's length depends on besides its settings."""

    train: int
    """Examples."""
    val: int
    test: int = 0
    components: int = 1
    """Predictors whose instruction may change."""
    teachers: int = 0
    start_version: int = 0


@dataclass(frozen=True)
class Planned:
    """The most that a run may spend: a search that ends early, and pairs that are known already, take less."""

    cycles: int
    steps: int
    fast: int
    slow: int
    training: int
    """Fast and slow together: less than their sum where `budget.max_rollouts` caps it."""
    eval: int
    reflection_calls: int

    @property
    def rollouts(self) -> int:
        """Program runs of all kinds."""
        return self.training + self.eval


def rollouts_per_step(config: FSTConfig, sizes: RunSizes) -> int:
    """Those of one batch."""
    group = config.rollout.group_size + sizes.teachers * config.rollout.teacher_rollouts
    return min(config.rollout.batch_size, sizes.train) * group


def planned(config: FSTConfig, sizes: RunSizes, dry_run: int = 0) -> Planned:
    """An upper bound on what a run spends, `dry_run` rollouts before it included; resumes may repeat some."""
    budget, length = config.budget, config.train.steps_per_cycle
    evolves, trains = config.search_rollouts != 0 and sizes.components > 0, config.method != "gepa"
    cycles, cap = budget.max_cycles, NO_CAP if budget.max_rollouts is None else budget.max_rollouts
    steps = min(cycles * length * trains, cap // rollouts_per_step(config, sizes))
    if budget.max_steps is not None:
        steps = min(steps, budget.max_steps)
        if config.method in ("fst", "rl"):  # the others have cycles without steps
            cycles = min(cycles, math.ceil(budget.max_steps / length))
    fast_cap = cap if config.search_rollouts is None else min(cap, config.search_rollouts)
    examples = min(sizes.val, config.eval.max_examples or sizes.val)
    kl_examples = min(sizes.val, config.eval.kl_examples)
    pair = examples + kl_examples * (trains or sizes.start_version > 0)
    pairs = min(config.eval.candidates, config.fast.population if evolves else 1)
    first = examples + kl_examples * (sizes.start_version > 0)
    # The cycle in which a search ends has slow steps too: it validates new prompts and new weights, as `fst` does.
    validations = cycles * pairs * (2 if config.method == "fst" else 1) + pairs * config.searches_first * evolves
    reflections = cycles * config.fast.max_proposals * evolves
    reflections *= sizes.components if config.fast.components == "all" else 1
    if config.fast.reflection_calls is not None:
        reflections = min(reflections, config.fast.reflection_calls)
    fast = min(cycles * config.fast.max_rollouts * evolves, fast_cap)
    slow = steps * rollouts_per_step(config, sizes)
    return Planned(
        cycles=cycles,
        steps=steps,
        fast=fast,
        slow=slow,
        training=min(fast + slow, cap),
        eval=dry_run + first + validations * pair + 2 * sizes.test,
        reflection_calls=reflections,
    )
