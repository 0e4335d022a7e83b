"""What is scored before a run's first cycle and after its last one, whatever the caps say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fst_optimizer.cycle import validate
from fst_optimizer.phases import commit, within_caps
from fst_optimizer.run.evaluate import evaluate
from fst_optimizer.run.run import Run
from fst_optimizer.run.state import State
from fst_optimizer.stream import before_stages
from fst_optimizer.types import Item


def start(run: Run, state: State, testset: Sequence[Item] | None) -> State:
    """The state, evaluated before any cycle."""
    if state.started:
        return state
    run.enter("eval", state)
    with run.meter.uncapped():
        state = within_caps(run, state, "eval", validate)
        if state.stream:
            state = within_caps(run, state, "eval", before_stages)
    state = replace(state, val_score_before=state.best.score)
    state, test_score = tested(run, state, testset)
    return commit(run, replace(state, test_score_before=test_score, started=True))


def tested(run: Run, state: State, testset: Sequence[Item] | None) -> tuple[State, float | None]:
    """The best pair's test score so far, its rollouts counted; None without a test set."""
    if testset is None:
        return state, None
    run.enter("test", state)
    with run.meter.uncapped(), run.meter.charging("eval"):
        found = evaluate(
            run.collector,
            state.best.candidate,
            testset,
            version=state.best.policy_version,
            on_rollout=run.metrics.counting("test", len(testset)),
        )
    return replace(state, **run.meter.spent()), found.score
