"""Work that a rollout's program gives to threads of its own belongs to the rollout, and calls that do not are counted.

dspy keeps its settings in a context variable, and with them the recorder, the trace and the usage tracker of a rollout.
A plain thread starts with none of it: its calls would be answered, and neither recorded, traced nor paid for. So while
rollouts run, a thread that one of them starts, and a task that one of them gives to a pool of threads, gets a copy of
the giver's context. Threads and tasks from outside of rollouts are left as they are.

What this cannot reach, such as a thread of the program's own that waits for work at a queue, still samples from the
policy: `StrayCalls` counts that.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any

import dspy
from dspy.utils.usage_tracker import UsageTracker

from fst_optimizer.engines.recorder import SETTING
from fst_optimizer.rollout.usage import counted_acall, counted_call, told_by_others

if TYPE_CHECKING:
    from fst_optimizer.engines.base import Generation, GenerationRequest
    from fst_optimizer.policy.policy import Policy

Function = Callable[..., Any]
REMEDY = (
    "Call the predictors in forward itself, or hand the work over from there with its context: dspy.Parallel, "
    "dspy.asyncify, a thread pool's submit, or functools.partial(contextvars.copy_context().run, function, ...)"
)
"""Of calls that no rollout knows as its own."""


def in_rollout() -> bool:
    """Whether this is a rollout's program, or the metric that judges it (for which the recorder is hidden)."""
    return SETTING in dspy.settings


# -- inheriting ---------------------------------------------------------------------------------------------------


def _start(plain: Function) -> Function:
    """`Thread.start`: the thread runs in a copy of the starter's context."""

    @functools.wraps(plain)
    def start(thread: threading.Thread) -> None:
        if in_rollout():
            setattr(thread, "run", _in_this_context(thread.run))  # noqa: B010  # one thread's, not the class's
        plain(thread)

    return start


def _take_task(plain: Function) -> Function:
    """A pool's method whose first argument is what to run: that runs in copies of the giver's context."""

    @functools.wraps(plain)
    def take_task(pool: Any, *args: Any, **kwargs: Any) -> Any:
        if in_rollout():
            if args:
                args = (_in_this_context(args[0]), *args[1:])
            elif "func" in kwargs:
                kwargs["func"] = _in_this_context(kwargs["func"])
        return plain(pool, *args, **kwargs)

    return take_task


def _start_workers(plain: Function) -> Function:
    """A pool's method that starts its threads: they may serve others later, so they inherit nothing themselves."""

    @functools.wraps(plain)
    def start_workers(pool: Any, *args: Any, **kwargs: Any) -> Any:
        run = contextvars.Context().run if in_rollout() else _call
        return run(plain, pool, *args, **kwargs)

    return start_workers


def _in_this_context(function: Function) -> Function:
    """The function, in a copy of the present context at each call: a context cannot be entered twice at once."""
    context = contextvars.copy_context()
    return lambda *args, **kwargs: context.copy().run(function, *args, **kwargs)


def _call(function: Function, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_WRAPPED: tuple[tuple[type, str, Callable[[Function], Function]], ...] = (
    (threading.Thread, "start", _start),
    (ThreadPoolExecutor, "submit", lambda plain: _take_task(_start_workers(plain))),
    (ThreadPool, "__init__", _start_workers),
    *(
        (ThreadPool, name, _take_task)
        for name in ("apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered")
    ),
    (UsageTracker, "add_usage", told_by_others),
    (dspy.BaseLM, "__call__", counted_call),
    (dspy.BaseLM, "acall", counted_acall),
)
_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def inherited_by_threads() -> Iterator[None]:
    """Threads and pools' tasks that are started inside of rollouts meanwhile belong to them.

    Every rollout is inside, one that has timed out until its program ends; any number may be at once.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _undo.extend(_wrap(*one) for one in _WRAPPED)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                while _undo:
                    _undo.pop()()


def _wrap(owner: type, name: str, wrapper: Callable[[Function], Function]) -> Callable[[], None]:
    """Replace a method, and return what puts it back."""
    own, before = name in vars(owner), getattr(owner, name)
    wrapped = wrapper(before)
    setattr(owner, name, wrapped)

    def undo() -> None:
        if vars(owner).get(name) is not wrapped:
            return  # someone else has wrapped it again; outside of rollouts ours does nothing
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


# -- counting -----------------------------------------------------------------------------------------------------


class StrayCalls:
    """Calls of a policy that came from outside of any rollout while rollouts ran: a `CallObserver`."""

    def __init__(self, policy: Policy) -> None:
        self.temperature = policy.temperature  # what such a call samples at anyway
        self.count = 0
        self.watchers = 0

    def add(self, request: GenerationRequest, generation: Generation, text: str) -> None:
        """A call was answered that no recorder kept."""
        if not in_rollout():  # a judge's calls come from a rollout
            with _lock:
                self.count += 1


def stray_calls(count: int) -> str:
    """What stray calls are, and what to do."""
    return (
        f"{count} call(s) of the policy came from outside of any rollout while rollouts ran: a thread or a process of "
        f"the program's own makes them, and they are neither recorded nor trained on. {REMEDY}"
    )


@contextmanager
def watched(policy: Policy) -> Iterator[Callable[[], int]]:
    """Gives the number of stray calls since. None are seen while a job of dspy's own optimizers observes the policy."""
    with _lock:
        present = policy.observer
        strays = present if isinstance(present, StrayCalls) else StrayCalls(policy)
        before = strays.count
        if present is None:
            policy.observer = strays
        strays.watchers += 1
    try:
        yield lambda: strays.count - before
    finally:
        with _lock:
            strays.watchers -= 1
            if not strays.watchers and policy.observer is strays:
                policy.observer = None
