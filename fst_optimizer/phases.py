"""A phase of a cycle as a transaction: done once over all resumes, within the caps, a checkpoint after it.

A run that died does its unfinished phase again, from the state before it and with the answers that it has paid for
already (`store.journal`), and comes to the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fst_optimizer.errors import Paused
from fst_optimizer.run.run import Run
from fst_optimizer.run.state import State
from fst_optimizer.store.meter import BudgetSpent

logger = logging.getLogger(__name__)

Phase = Callable[..., State]
"""`phase(run, state, *arguments)` gives the state after it."""


class Phases:
    """The phases of one cycle, in the order in which they are called; the first `done` of them are skipped.

    `before`: how many phases at the cycle's beginning this kind of run does not have.
    """

    def __init__(self, run: Run, done: int, before: int = 0) -> None:
        self.run = run
        self._done = done
        self._number = before

    def __call__(self, state: State, phase: Phase, *arguments: Any, kind: str = "") -> State:
        """The state after the next phase, committed.

        Its rollouts count as `kind`: `fast`, `slow` or `eval`. Once the run has ended it is left out. A phase without
        a kind spends nothing itself, and is always done.

        Raises:
            Paused: A monitor asks for it; the checkpoint is written.
        """
        self._number += 1
        if self._number <= self._done:
            return state
        state = replace(stopped_if_asked(self.run, state), phase=self._number)
        if not state.ended:
            self.run.enter(kind or "eval", state)
        if not kind:
            state = phase(self.run, state, *arguments)
        elif not state.ended:
            state = within_caps(self.run, state, kind, phase, *arguments)
        return commit(self.run, state)


def within_caps(run: Run, state: State, kind: str, phase: Phase, *arguments: Any) -> State:
    """The state after a phase, with what was spent. Where a cap is reached in it: the state before, ended."""
    with run.meter.charging(kind):
        try:
            state = phase(run, state, *arguments)
        except BudgetSpent as spent:
            state = replace(state, ended="budget", cap=state.cap or spent.cap)
    return replace(state, **run.meter.spent())


def stopped_if_asked(run: Run, state: State) -> State:
    """The state, ended where a callback raised `StopRun`."""
    return replace(state, ended="stopped") if run.metrics.stop_asked and not state.ended else state


def warned(run: Run, state: State) -> State:
    """The state, with what was warned of until now."""
    return replace(state, warnings=tuple(dict.fromkeys((*state.warnings, *run.warnings.texts))))


def commit(run: Run, state: State) -> State:
    """The state, written down; its alarms are logged, and pause the run where the settings say so.

    Raises:
        Paused: After the checkpoint is written.
        StorageError: It could not be written; the one before stands.
    """
    state = warned(run, state)
    run.saver.commit(state)
    for alarm in state.alarms:
        logger.warning("monitor %s: %s", alarm.monitor, alarm.text)
    pausing = [alarm for alarm in state.alarms if getattr(run.config.monitors, alarm.monitor) == "pause"]
    if pausing:
        raise Paused(
            "; ".join(f"monitor {alarm.monitor}: {alarm.text}" for alarm in pausing)
            + f". Resume to go on all the same (--resume, or resume=True, with {str(run.files.root)!r})"
        )
    return replace(state, alarms=())
