"""Threads for rollouts: each job has a deadline, and a job that misses it holds up no other.

A Python thread cannot be killed. A job that misses its deadline is told to stop (its LM calls are refused from then
on), a result is made up for it, and a fresh thread takes the place of its own.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_STOP_S = 2.0
"""How long stopped jobs are waited for."""
LONGEST_WAIT_S = 3600.0
"""Of one wait for a job; there are more after it. Python refuses to wait for some centuries at once."""


class Job(Protocol[T_co]):
    """Something to run in a thread."""

    def run(self) -> T_co:
        """Do the work and return its result. What it raises stops the batch."""

    def stop(self) -> None:
        """Called from another thread: finish as soon as you can."""

    def timed_out(self, seconds: float) -> T_co:
        """Called from another thread, before `stop`: the result, as the deadline of `seconds` was missed."""


def run_jobs(
    jobs: Sequence[Job[T]],
    *,
    num_threads: int,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    halted: Callable[[], bool] = lambda: False,
    grace_s: float = 0.0,
    what: str = "rollouts",
) -> Generator[tuple[int, T]]:
    """Yield (index, result) as jobs finish; a job has `timeout_s` seconds of `clock`.

    Once `halted()`, asked before each job, is true, no further one is started, and the iterator ends with those that
    were. Closing the iterator early, or an exception in a job, stops every job and waits a moment for the threads. A
    KeyboardInterrupt first leaves the jobs under way `grace_s` seconds to finish, which a warning says of `what`;
    another one stops them.
    """
    batch = _Batch(jobs, timeout_s, clock, halted, what)
    try:
        batch.start_threads(min(num_threads, len(jobs)))
        for _ in range(len(jobs)):
            ended = batch.next_result()
            if ended is None:
                return
            yield ended
    except KeyboardInterrupt:
        batch.let_finish(grace_s)
        raise
    finally:
        batch.stop()


@dataclass
class _Batch(Generic[T]):
    """The jobs of one `run_jobs`."""

    jobs: Sequence[Job[T]]
    timeout_s: float
    clock: Callable[[], float]
    halted: Callable[[], bool]
    what: str
    done: queue.SimpleQueue[tuple[int, T] | BaseException] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    deadlines: dict[int, float] = field(default_factory=dict)
    """Of the jobs under way."""
    threads: list[threading.Thread] = field(default_factory=list)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.todo = iter(range(len(self.jobs)))

    def start_threads(self, count: int) -> None:
        for _ in range(count):
            # dspy keeps its settings in context variables: the caller's must reach the program.
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(self._work,), name="fst-rollout", daemon=True)
            self.threads.append(thread)
            thread.start()

    def _work(self) -> None:
        try:
            while (index := self._take()) is not None:
                ended: tuple[int, T] | BaseException
                try:
                    ended = (index, self.jobs[index].run())
                except BaseException as error:
                    ended = error
                with self.lock:
                    in_time = self.deadlines.pop(index, None) is not None
                if not in_time:
                    return  # another thread has taken the place of this one
                self.done.put(ended)
        except BaseException as error:  # `halted` or `clock` raised
            self.done.put(error)

    def _take(self) -> int | None:
        """The next job to run, if any. Under the lock: a job must always be either to do or under way."""
        with self.lock:
            if self.stopping or self.halted():
                return None
            index = next(self.todo, None)
            if index is not None:
                self.deadlines[index] = self.clock() + self.timeout_s
            return index

    def next_result(self) -> tuple[int, T] | None:
        """Wait for a job to end; None when the batch was halted and nothing is under way any more."""
        while True:
            with self.lock:
                now = self.clock()
                wait_s = min(self.deadlines.values(), default=now + 0.05) - now
            try:
                ended = self.done.get(timeout=min(max(0.0, wait_s) + 0.001, LONGEST_WAIT_S))
            except queue.Empty:
                self._expire()
                with self.lock:
                    idle = not self.deadlines and self.done.empty()
                if idle and self.halted():
                    return None
                continue
            if isinstance(ended, BaseException):
                raise ended
            return ended

    def _expire(self) -> None:
        """Give the jobs that missed their deadline a result, and their places to new threads."""
        now = self.clock()
        with self.lock:
            expired = [index for index, deadline in self.deadlines.items() if deadline <= now]
            for index in expired:
                del self.deadlines[index]
        for index in expired:
            self.done.put((index, self.jobs[index].timed_out(self.timeout_s)))
            self.jobs[index].stop()
            self.start_threads(1)

    def let_finish(self, grace_s: float) -> None:
        """Start nothing more, and wait for what is under way."""
        self.stopping = True
        limit = time.monotonic() + grace_s
        if self.deadlines and grace_s:
            logger.warning(
                "interrupted; waiting up to %g s for %d %s (again to drop them)",
                *(grace_s, len(self.deadlines), self.what),
            )
        while self.deadlines and time.monotonic() < limit:
            time.sleep(0.02)

    def stop(self) -> None:
        """Start nothing more, stop what is under way and wait a moment for it."""
        self.stopping = True
        with self.lock:
            running = tuple(self.deadlines)
        for index in running:
            self.jobs[index].stop()
        limit = time.monotonic() + _STOP_S
        if running:
            for thread in self.threads:
                thread.join(max(0.0, limit - time.monotonic()))
