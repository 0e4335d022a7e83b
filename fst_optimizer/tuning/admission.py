"""Who may start a trial: pure functions of a study's trials.

N is the number of finished trials, complete or pruned. Workers on many machines keep to it through the storage alone.
A worker asks before it takes a trial, and again once it has one: then only trials with lower numbers, running or still
to be run, compete for the places that are left, so that no two workers take the same place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
IN_A_ROW = 3
"""Failures of one cause after which a study stops."""
INTERRUPTED, SURPLUS = "interrupted", "surplus"
"""Causes that say nothing about the trial: Ctrl-C, and a trial that the study had no place for."""
KILLED = "worker killed"


@dataclass(frozen=True)
class Limits:
    """When a study has enough."""

    trials: int
    """N, finished ones."""
    cap: int
    """Training rollouts of one trial."""
    budget: int | None = None
    """Training rollouts of all trials together. None: no cap."""


def rollouts_of(trial: FrozenTrial) -> int:
    """Training rollouts that a trial has spent so far."""
    return int(trial.user_attrs.get("rollouts", 0))


def cause_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed; one that recorded no cause lost its worker. None for one that did not fail."""
    return str(trial.user_attrs.get("cause", KILLED)) if trial.state == TrialState.FAIL else None


def finished(trials: Collection[FrozenTrial]) -> int:
    """How many are complete or pruned."""
    return sum(trial.state in FINISHED for trial in trials)


def admission(
    trials: Collection[FrozenTrial], limits: Limits, before: int | None = None
) -> Literal["start", "wait", "done", "budget"]:
    """What a worker may do: start a trial, wait for those that run, or end: the study is done, or the budget is spent.

    `before` is the number of the trial that the worker has: only trials before it compete. None: it has none, and all
    running trials do.
    """
    if finished(trials) >= limits.trials:
        return "done"
    competing = {
        trial.number
        for trial in trials
        if (trial.state == TrialState.RUNNING if before is None else trial.number < before)
        and not trial.state.is_finished()
    }
    if finished(trials) + len(competing) >= limits.trials:
        return "wait"
    if limits.budget is not None:
        spent = sum(rollouts_of(trial) for trial in trials if trial.number not in {*competing, before})
        if spent + limits.cap * (len(competing) + 1) > limits.budget:
            return "wait" if competing else "budget"
    return "start"


def repeated_failure(trials: Sequence[FrozenTrial], known: Collection[int] = ()) -> str | None:
    """The cause of which the last three trials to end have failed. None: there is no such cause.

    `known` are numbers of trials that ended before this worker started. They do not count: whoever starts again after a
    failure has removed its cause.
    """
    ended = [
        trial
        for trial in trials
        if trial.datetime_complete and trial.number not in known and cause_of(trial) not in (INTERRUPTED, SURPLUS)
    ]
    last = sorted(ended, key=lambda trial: (trial.datetime_complete, trial.number))[-IN_A_ROW:]
    causes = {cause_of(trial) for trial in last}
    return causes.pop() if len(last) == IN_A_ROW and len(causes) == 1 else None
