"""The seam through which tests break things: named places where a fault can be let in.

Code that touches the world outside passes such a place, with what it is about to return:

    failpoint("files.write", path)
    answer = failpoint("reflection.answer", answer)

Nothing happens there unless a test says so:

    with inject("files.write", raising(OSError(errno.ENOSPC, "No space left on device")), after=3):
        ...
"""

from __future__ import annotations

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


@dataclass
class _Fault:
    effect: Effect
    after: int
    times: int | None


_faults: dict[str, list[_Fault]] = {}
_lock = threading.Lock()


def failpoint(place: str, value: T) -> T:
    """What passes this place: `value`, unless a test has let a fault in."""
    if not _faults:
        return value
    for fault in _due(place):
        value = fault.effect(value)
    return value


def _due(place: str) -> list[_Fault]:
    due = []
    with _lock:
        for fault in _faults.get(place, ()):
            fault.after -= 1
            if fault.after < 0 and fault.times != 0:
                fault.times = None if fault.times is None else fault.times - 1
                due.append(fault)
    return due


@contextmanager
def inject(place: str, effect: Effect, *, after: int = 0, times: int | None = None) -> Iterator[None]:
    """Let a fault in at a place while the block runs.

    Args:
        place: One of `PLACES`.
        effect: What happens there.
        after: Passages that go well before the first that does not.
        times: Passages that do not. None: all further ones.
    """
    assert place in PLACES, place
    fault = _Fault(effect, after, times)
    with _lock:
        _faults.setdefault(place, []).append(fault)
    try:
        yield
    finally:
        with _lock:
            _faults[place].remove(fault)
            if not _faults[place]:
                del _faults[place]


def raising(error: BaseException) -> Effect:
    """A fault that raises."""

    def effect(_: Any) -> Any:
        raise error

    return effect
