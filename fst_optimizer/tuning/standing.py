"""Where a study stands, and whether a worker may start another trial: pure functions of its trials.

N is the number of finished trials, complete or pruned. Workers on many machines agree on it through the storage alone:
whoever has been given a trial looks at the others, and goes ahead where those that are finished, running, or still to
be run before it leave room. A trial that comes later counts this one, so that no two of them take one place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FINISHED, ALIVE = ("complete", "pruned"), ("running", "waiting")
IN_A_ROW = 3
"""Failures of one cause after which a study stops."""
NO_FAULT = ("interrupted", "surplus")
"""Causes that say nothing about the trial."""
KILLED = "worker killed"


@dataclass(frozen=True)
class Seen:
    """What matters of a trial here."""

    number: int
    state: str
    """`complete`, `pruned`, `fail`, `running` or `waiting`."""
    rollouts: int = 0
    """Training rollouts so far."""
    cause: str = ""
    """Of a failed one."""
    ended_s: float = 0.0
    """When it ended; 0 while it has not."""


@dataclass(frozen=True)
class Limits:
    """When a study has enough."""

    trials: int
    """N, finished ones."""
    cap: int
    """Training rollouts of one trial."""
    budget: int | None = None
    """Training rollouts of all trials together. None: no cap."""


def seen(trials: Sequence[FrozenTrial]) -> list[Seen]:
    """The trials of a study, as they are needed here."""
    return [
        Seen(
            trial.number,
            trial.state.name.lower(),
            int(trial.user_attrs.get("rollouts", 0)),
            cause_of(trial),
            trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0,
        )
        for trial in trials
    ]


def cause_of(trial: FrozenTrial) -> str:
    """Why a trial failed; one whose worker wrote nothing down was killed. "" for one that did not."""
    return str(trial.user_attrs.get("cause", KILLED)) if trial.state.name == "FAIL" else ""


def finished(trials: Collection[Seen]) -> int:
    """Complete and pruned trials."""
    return sum(trial.state in FINISHED for trial in trials)


def spent(trials: Collection[Seen]) -> int:
    """Training rollouts of all trials, failed ones included."""
    return sum(trial.rollouts for trial in trials)


def room(trials: Collection[Seen], limits: Limits, before: int | None = None) -> str:
    """What a worker may do: `start`, `wait` for trials that run, or end: the study is `done`, or the `budget` is spent.

    Args:
        trials: All of the study.
        limits: When it has enough.
        before: The number of a trial that was given out: only those before it stand in its way. None: all that run.
    """
    if finished(trials) >= limits.trials:
        return "done"
    running = [trial for trial in trials if _in_the_way(trial, before)]
    if finished(trials) + len(running) >= limits.trials:
        return "wait"
    if limits.budget is not None:
        others = spent([trial for trial in trials if trial not in running and trial.number != before])
        if others + limits.cap * (len(running) + 1) > limits.budget:
            return "wait" if running else "budget"
    return "start"


def _in_the_way(trial: Seen, before: int | None) -> bool:
    if before is None:
        return trial.state == "running"
    return trial.state in ALIVE and trial.number < before


def repeated_failure(trials: Collection[Seen], known: Collection[int] = ()) -> str:
    """The cause that the last three trials failed of, "" where there is none.

    Args:
        trials: All of the study.
        known: Trials that had ended before, and do not count: whoever goes on after a failure has mended it.
    """
    ended = [trial for trial in trials if trial.ended_s and trial.number not in known and trial.cause not in NO_FAULT]
    last = sorted(ended, key=lambda trial: (trial.ended_s, trial.number))[-IN_A_ROW:]
    causes = {trial.cause for trial in last}
    return causes.pop() if len(last) == IN_A_ROW and len(causes) == 1 else ""
