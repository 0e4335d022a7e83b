"""What a method's cycle has, and what the budget leaves for it. Pure functions of the settings and the state.

The methods are one cycle with parts left out, so that comparing them compares the methods: `rl` has no fast rounds,
`gepa` no slow steps; `sequential` and `once` have fast rounds until so many rollouts are spent (half of the run's, or
`fast.once_rollouts`), then slow steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import with_groups
from fst_optimizer.rollout.credit import is_flat, reward
from fst_optimizer.rollout.gather import Gathered
from fst_optimizer.rollout.groups import grouped
from fst_optimizer.run.allocation import (
    Allocation,
    Ledger,
    Means,
    after_round,
    after_step,
    decide,
    under_others,
    worn_out,
)
from fst_optimizer.run.gains import worth_training
from fst_optimizer.run.state import State, Stream
from fst_optimizer.types import Item, Population

if TYPE_CHECKING:
    from fst_optimizer.evolve.round import FastRound

NO_CAP = 1 << 62
"""Rollouts left where the run has no cap on them."""
BARREN_ROUNDS = 2
FIRST_STEP = 3
"""Phase 1 of a cycle is the fast round, 2 a validation, 3 the first slow step."""
MOST_TRIED = 5000
"""Candidates that a search remembers as tried."""


def allotted(config: FSTConfig, state: State) -> State:
    """The state, with what the cycle before it is to do. A cycle that is under way keeps what was decided."""
    if not config.adapts or state.phase:
        return state
    ledger = state.ledger or Ledger()
    now = decide(ledger, _means(config, state), f"allocation/{config.seed}/{state.cycle}")
    if now.steps and worn_out(ledger, config.train.steps_per_cycle):
        ledger = replace(ledger, flat=(), still=0)  # other draws may differ
    return replace(state, ledger=replace(ledger, now=now))


def allotment(config: FSTConfig, state: State) -> Allocation | None:
    """What was decided for this cycle. None: it is fixed."""
    return state.ledger.now if config.adapts and state.ledger else None


def announced(config: FSTConfig, state: State) -> tuple[State, dict[str, Any]]:
    """What the next line of `metrics.jsonl` says of this cycle's decision, once; the state in which it has said so."""
    now = allotment(config, state)
    if now is None or now.told or state.ledger is None:
        return state, {}
    said = {"proposals": now.proposals, "examples": now.examples, "steps": now.steps}
    state = replace(state, ledger=replace(state.ledger, now=replace(now, told=True)))
    return state, {"allocation": said, "reason": now.reason}


def _means(config: FSTConfig, state: State) -> Means:
    left, most = reflections_left(config, state), config.budget.max_steps
    closed = (state.ledger is not None and state.ledger.closed) or (left is not None and left <= 0)
    last = max(state.validated.values(), key=lambda one: one.policy_version, default=state.best)
    length = config.train.steps_per_cycle
    return Means(
        rollouts=rollouts_left(config, state),
        round_rollouts=config.fast.max_rollouts,
        proposals=0 if closed else config.fast.max_proposals,
        examples=config.fast.anchor_size,
        candidates=len(searched_population(config, state).candidates),
        steps=length if most is None else max(0, min(length, most - state.step)),
        step_rollouts=config.rollout.batch_size * config.rollout.group_size,
        version=state.policy_version,
        kl=last.kl_to_base,
    )


def cycle_config(config: FSTConfig, state: State) -> FSTConfig:
    """The settings for this cycle's fast round: what was decided for it stands for what was set."""
    now = allotment(config, state)
    if now is None:
        return config
    return config.with_values({"fast.max_proposals": now.proposals, "fast.anchor_size": max(1, now.examples)})


def has_fast_round(config: FSTConfig, state: State) -> bool:
    """Whether this cycle evolves prompts: the search is not over, and one candidate on the anchor can be paid for."""
    now = allotment(config, state)
    if config.method == "rl" or state.search_over or (now and not now.examples):
        return False
    return fast_rollouts_left(config, state) >= config.fast.anchor_size


def has_slow_steps(config: FSTConfig, state: State) -> bool:
    """Whether this cycle updates the weights."""
    if config.searches_first:
        return not has_fast_round(config, state)
    now = allotment(config, state)
    if now and state.phase >= FIRST_STEP + now.steps:
        return False
    return config.method in ("fst", "rl") and not (state.stream and state.stream.hurry)


def trained_population(config: FSTConfig, state: State) -> Population:
    """The candidates under whose prompts the weights are trained: after a search it is the best one alone."""
    if not config.searches_first:
        return state.population
    return Population((state.best.candidate,), state.policy_version)


def searched_population(config: FSTConfig, state: State) -> Population:
    """The candidates that a fast round starts from: the population, and the seed instructions where they are tried.

    After a switch in a stream they are, and in every round that decides whether to train under others.
    """
    seed, ledger, candidates = state.seed, state.ledger, state.population.candidates
    if seed is None:
        return state.population
    if config.adapts:
        others = (one for one in (*candidates, *(ledger.waiting if ledger else ())) if one.id != seed.id)
        candidates = (*list(others)[: max(1, config.fast.population - 1)], seed)
    elif state.stream and state.stream.retry and seed.id not in {one.id for one in candidates}:
        candidates = (*candidates, seed)
    return replace(state.population, candidates=candidates)


def kept_population(config: FSTConfig, state: State, found: FastRound) -> Population:
    """The candidates that are trained under after a fast round."""
    if not config.adapts or state.seed is None:
        return found.population
    if not found.scores:  # it could not score anything
        return state.population
    candidates = worth_training(found.population.candidates, found.scores, state.seed, found.accepted)
    known = {name: found.scores[name] for name in (*found.population.scores, state.seed.id) if name in found.scores}
    return replace(found.population, candidates=candidates, scores=known)


def unlearned(config: FSTConfig, state: State, batch: Sequence[Item]) -> tuple[Item, ...]:
    """The examples of a batch without those whose groups are known to be flat under these weights and prompts."""
    known = state.ledger.flat if config.adapts and state.ledger else ()
    return tuple(item for item in batch if item.id not in known)


def after_slow_step(config: FSTConfig, state: State, found: Gathered | None = None, *, updated: bool = False) -> State:
    """The state, with what a slow step says of the next ones. None: it had no example with signal left."""
    collected = grouped(found.rollouts) if found else []
    state = replace(state, for_groups=()) if found else state
    if config.rollout.order == "undecided":
        state = replace(state, success_now=with_groups(state.success_now, collected))
    if not config.adapts or state.ledger is None:
        return state
    groups = grouped([one for one in found.rollouts if not one.lost]) if found else []
    rewards = {one.example_id: [reward(rollout, config.rollout) for rollout in one.rollouts] for one in groups}
    ran = len(found.ran) if found else 0
    ledger = after_step(
        state.ledger,
        {name: sum(some) / len(some) for name, some in rewards.items()},
        [name for name, some in rewards.items() if is_flat(some)],
        rollouts=ran,
        spent=state.rollouts.slow + ran,
        updated=updated,
    )
    return replace(state, ledger=ledger)


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


def validation_due(config: FSTConfig, state: State, *, ends: bool) -> bool:
    """Whether enough was learned from since the last validation. With `ends`, a cycle's: or no other may come."""
    if not state.started or state.rollouts.training - state.validated_at >= config.eval.every_rollouts:
        return True
    if not ends:
        return False
    return bool(next_cycle(config, state).ended) or (state.stream is not None and stage_over(config, state))


def next_cycle(config: FSTConfig, state: State) -> State:
    """The state before the next cycle, or the run's last one."""
    now = allotment(config, state)
    steps = now.steps if now else config.train.steps_per_cycle
    state = replace(state, cycle=state.cycle + 1, batch=state.batch + steps, phase=0)
    state = replace(state, kept=kept_versions(state, config.run.keep_versions), success=state.success_now)
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
    if config.adapts:
        now = allotment(config, allotted(config, state))
        return state if now and (now.examples or now.steps) else replace(state, ended="budget", cap="max_rollouts")
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
    if state.stream:
        state = replace(state, stream=replace(state.stream, retry=False))
    if config.adapts:
        return _after_adaptive_round(config, state, found)
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


def _after_adaptive_round(config: FSTConfig, state: State, found: FastRound) -> State:
    """With what the round says of the next ones, and what is trained under from now on."""
    old, means = state.ledger or Ledger(), _means(config, state)
    ledger = after_round(
        old,
        found.scores,
        [one.id for one in searched_population(config, state).candidates],
        state.seed.id if state.seed else "",
        rollouts=found.rollouts,
        accepted=found.accepted,
        outlook=found.outlook,
        version=state.policy_version,
        kl=means.kl,
    )
    trained = {one.id for one in kept_population(config, state, found).candidates}
    if found.scores:
        unsure = (one for one in found.population.candidates if one.id not in trained and one != state.seed)
        ledger = replace(ledger, waiting=tuple(unsure))
    if trained != {one.id for one in state.population.candidates}:
        ledger = under_others(ledger)
    # Rounds under the same weights are one search: what it has tried is nothing new.
    before = state.tried if old.round_version == state.policy_version else ()
    return replace(state, ledger=ledger, tried=tuple(dict.fromkeys((*before, *found.tried)))[-MOST_TRIED:])


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
