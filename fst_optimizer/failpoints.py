"""Failpoints: named places in the code where tests let faults in.

Code that deals with disks, models, servers or the user's functions passes such a place:

    failpoint("files.write", path)
    answer = failpoint("reflection.answer", answer)

Nothing happens there unless a test says so:

    with inject("files.write", raising(OSError(errno.ENOSPC, "No space left on device")), after=3):
        ...
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Effect = Callable[[Any], Any]
"""Given what passes the place; returns what passes instead, or raises."""

PLACES = (
    "engine.answer",
    "reflection.answer",
    "metric.answer",
    "files.write",
    "files.commit",
    "trainer.step",
    "policy.publish",
    "rollout.end",
)
"""Where faults can be let in. `engine.answer` is passed by each `Generation`, `reflection.answer` by the LM's text,
`metric.answer` by what the metric returned, `files.write` by the path that is about to be written, `files.commit` by
the path of `state.json` just before it is replaced, `trainer.step` by the rows of a slow step, `policy.publish` by the
number of the version, `rollout.end` by each rollout before it is written down."""


@dataclass(eq=False)
class _Fault:
    place: str
    effect: Effect
    after: int
    times: float

    def due(self, place: str) -> bool:
        if place != self.place:
            return False
        self.after -= 1
        if self.after >= 0 or self.times <= 0:
            return False
        self.times -= 1
        return True


_faults: list[_Fault] = []
_lock = threading.Lock()


def failpoint(place: str, value: T) -> T:
    """What passes this place: `value`, unless a test has let a fault in."""
    if not _faults:
        return value
    with _lock:
        due = [fault for fault in _faults if fault.due(place)]
    for fault in due:
        value = fault.effect(value)
    return value


@contextmanager
def inject(place: str, effect: Effect, *, after: int = 0, times: int | None = None) -> Iterator[None]:
    """Let a fault in at a place while the block runs.

    The place is passed `after` times unharmed first; then the fault happens `times` times, or always (None).
    """
    assert place in PLACES, place
    fault = _Fault(place, effect, after, math.inf if times is None else times)
    with _lock:
        _faults.append(fault)
    try:
        yield
    finally:
        with _lock:
            _faults.remove(fault)


def raising(error: BaseException) -> Effect:
    """A fault that raises."""

    def effect(_: Any) -> Any:
        raise error

    return effect
