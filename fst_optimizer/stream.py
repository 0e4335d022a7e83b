"""Several tasks in one uninterrupted run: what a stream adds to the cycle.

Weights, population and optimizer go on from stage to stage, the seed instructions are one for all, and nothing but the
data depends on the stage: no validation score chooses anything, so the pair that a stage ends with is its last one. A
switch is noticed from what the phases see (`run.switches`). What follows is modest: `fst` leaves out the rest of the
cycle's steps, so that a fast round comes at once; `sequential` searches for prompts again; both try the seed
instructions beside the population, in which there may be nothing but what the old task asked for. `rl` and `once` do
nothing. Nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.extractive import sentences
from fst_optimizer.evolve.reflect import PERFECT
from fst_optimizer.rollout.credit import reward
from fst_optimizer.rollout.groups import grouped
from fst_optimizer.run.allocation import after_switch
from fst_optimizer.run.evaluate import evaluate
from fst_optimizer.run.record import digest
from fst_optimizer.run.state import StageEnd, State, Stream
from fst_optimizer.run.switches import Lookout, after_feedback, after_scores, fell
from fst_optimizer.types import Rollout

if TYPE_CHECKING:
    from fst_optimizer.data import Stage
    from fst_optimizer.run.run import Run

MANY_CYCLES = 100_000
"""The rollouts of its stages end a stream, not a number of cycles."""


def stream_config(config: FSTConfig, stages: int) -> FSTConfig:
    """The settings of a stream of so many stages.

    Raises:
        UserError: no rollouts of a stage are given, or fewer than a step takes; the method has no slow steps; or
            something else than the stages would end the run.
    """
    budget, step = config.budget, config.rollout.batch_size * config.rollout.group_size
    if budget.stage_rollouts is None or budget.stage_rollouts < step:
        raise UserError(
            f"budget.stage_rollouts is {budget.stage_rollouts}: give the rollouts of each stage, at least those of one "
            f"step ({step}, rollout.batch_size x rollout.group_size)"
        )
    if config.method == "gepa":
        raise UserError("method is 'gepa', whose search may end before a stream does: give 'fst', 'rl' or 'sequential'")
    total = stages * budget.stage_rollouts
    allowed = {"max_rollouts": (None, total), "max_steps": (None,), "patience": (None,)}
    for name, values in allowed.items():
        if (value := getattr(budget, name)) not in values:
            raise UserError(f"budget.{name} is {value}: a stream ends when its stages do, so leave it out")
    return config.with_values({"budget.max_rollouts": total, "budget.max_cycles": MANY_CYCLES})


def described(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What `config.json` says of a stream's data."""
    return [{"name": one.name, "train": digest(one.train), "val": digest(one.val)} for one in stages]


def result_fields(stages: Sequence[Stage], stream: Stream) -> dict[str, Any]:
    """What `result.json` has besides: every stage that ended, with the scores on the validation sets of all."""
    names = [stage.name for stage in stages]
    return {
        "stage_scores_before": dict(zip(names, stream.before, strict=True)),
        "stages": [
            {
                "name": name,
                "candidate": dict(end.candidate.texts),
                "policy_version": end.policy_version,
                "kl_to_base": end.kl_to_base,
                "rollouts": end.rollouts,
                "scores": dict(zip(names, end.scores, strict=True)),
            }
            for name, end in zip(names, stream.ends, strict=False)
        ],
        "switches": list(stream.switches),
    }


def scores_everywhere(run: Run, state: State) -> tuple[float, ...]:
    """The newest pair's greedy score on every stage's validation set."""
    best, config = state.best, run.config.eval
    assert state.stream is not None
    scores = []
    for number, stage in enumerate(run.stages):
        if number == state.stream.stage:  # it was just validated there
            scores.append(best.score)
            continue
        items = stage.val[: config.max_examples]
        found = evaluate(
            run.collector,
            best.candidate,
            items,
            version=best.policy_version,
            temperature=config.temperature,
            on_rollout=run.metrics.counting("eval", len(items)),
        )
        scores.append(found.score)
    return tuple(scores)


def before_stages(run: Run, state: State) -> State:
    """The state, with the start's scores on every stage."""
    assert state.stream is not None
    return replace(state, stream=replace(state.stream, before=scores_everywhere(run, state)))


def end_of_stage(run: Run, state: State) -> State:
    """The state, with what the stage ended with."""
    assert state.stream is not None
    best = state.best
    spent = state.rollouts.training
    end = StageEnd(best.candidate, best.policy_version, best.kl_to_base, spent, scores_everywhere(run, state))
    return replace(state, stream=replace(state.stream, ends=(*state.stream.ends, end)))


def watch_step(run: Run, state: State, rollouts: Sequence[Rollout]) -> tuple[State, bool]:
    """After a slow step: the state, and whether the rewards say that the task is another one."""
    if state.stream is None:
        return state, False
    answered = [one for one in rollouts if not one.lost]
    rewards = [[reward(one, run.config.rollout) for one in group.rollouts] for group in grouped(answered)]
    seen, switch = after_scores(state.stream.lookout, [sum(some) / len(some) for some in rewards])
    return _watched(run, state, seen, switch, hurry=run.config.method == "fst"), switch


def watch_round(run: Run, state: State, rollouts: Sequence[Rollout]) -> tuple[State, bool]:
    """After a fast round's rollouts: the state with the population from before it, and whether the task is another.

    What led comes first in a round, on the new anchor.
    """
    if state.stream is None:
        return state, False
    (leader,) = state.population.leading(1)
    answered = [one for one in rollouts if not one.lost]
    first = {one.example_id: one.score for one in reversed(answered) if one.candidate_id == leader.id}
    old = {one.id for one in state.population.candidates}
    failing = [one for one in answered if one.candidate_id in old and one.score < PERFECT]
    said = [[part for text in one.feedback.values() for part in sentences(text)] for one in failing]
    seen, told = after_feedback(state.stream.lookout, said)
    worse = fell(list(state.population.scores.get(leader.id, {}).values()), list(first.values()))
    if worse and not told:
        seen = Lookout(said=seen.said)
    return _watched(run, state, seen, told or worse, hurry=False), told or worse


def _watched(run: Run, state: State, seen: Lookout, switch: bool, *, hurry: bool) -> State:
    assert state.stream is not None
    stream = replace(state.stream, lookout=seen)
    if switch:
        stream = replace(stream, switches=(*stream.switches, run.meter.rollouts.training), hurry=hurry, retry=True)
        state = replace(state, ledger=state.ledger and after_switch(state.ledger))
        if run.config.method == "sequential":
            stream = replace(stream, searched=state.rollouts.fast)
            state = replace(state, barren=0, tried=(), search_over="")
    return replace(state, stream=stream)
