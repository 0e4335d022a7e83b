"""Threads for rollouts: each job has a deadline, and nobody waits for one that missed it.

A Python thread cannot be killed. A job that outlives its deadline is told to stop (its LM calls are refused from
then on), its result is no longer wanted, and a fresh thread takes its place, so that one hanging tool does not slow
the rest down.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Job(Protocol):
    """Something to run in a thread."""

    def run(self) -> object:
        """Do the work and return its result. What it raises stops the batch."""
        ...

    def stop(self) -> None:
        """Called from another thread: finish as soon as you can."""
        ...


JobT = TypeVar("JobT", bound=Job)
_GRACE_S = 2.0


def run_jobs(
    jobs: Sequence[JobT],
    *,
    num_threads: int,
    timeout_s: float,
    late: Callable[[JobT, float], object],
    clock: Callable[[], float] = time.monotonic,
    halted: Callable[[], bool] = lambda: False,
    grace_s: float = 0.0,
) -> Generator[tuple[int, object]]:
    """Yield (index, result) as jobs finish; `late(job, seconds)` is the result of one that missed its deadline.

    `late` is asked before the job is stopped. `clock` gives the seconds that deadlines are measured in. Once `halted()`
    is true no further job is started, and the iterator ends with those that were. Closing the iterator early, or an
    exception in a job, stops every job and waits a moment for the threads. A KeyboardInterrupt first leaves the jobs
    under way `grace_s` seconds to finish; another one stops them.
    """
    run = _Run(jobs, timeout_s, late, clock, halted)
    try:
        run.start_threads(min(num_threads, len(jobs)))
        for _ in range(len(jobs)):
            found = run.next_result()
            if found is None:
                return
            index, result, error = found
            if error is not None:
                raise error
            yield index, result
    except KeyboardInterrupt:
        run.let_finish(grace_s)
        raise
    finally:
        run.finish()


class _Run:
    """One batch of jobs in flight."""

    def __init__(
        self,
        jobs: Sequence[Any],
        timeout_s: float,
        late: Callable[[Any, float], object],
        clock: Callable[[], float],
        halted: Callable[[], bool],
    ) -> None:
        self.jobs = jobs
        self.timeout_s = timeout_s
        self.late = late
        self.clock = clock
        self.halted = halted
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            self.todo.put(index)
        self.done: queue.SimpleQueue[tuple[int, object, BaseException | None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.threads: list[threading.Thread] = []
        self.stopping = False

    def start_threads(self, count: int) -> None:
        for _ in range(count):
            # dspy keeps its settings in context variables: the caller's must reach the program.
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(self._work,), name="fst-rollout", daemon=True)
            self.threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while not self.stopping:
            with self.lock:  # a job is either to do or under way, whoever looks
                try:
                    if self.stopping or self.halted():
                        return
                    index = self.todo.get_nowait()
                except queue.Empty:
                    return
                except BaseException as raised:  # what `halted` could not decide stops the batch
                    self.done.put((0, None, raised))
                    return
                self.deadlines[index] = self.clock() + self.timeout_s
            result: object = None
            error: BaseException | None = None
            try:
                result = self.jobs[index].run()
            except BaseException as raised:
                error = raised
            with self.lock:
                in_time = self.deadlines.pop(index, None) is not None
            if not in_time:
                return  # its place was taken when it missed the deadline
            self.done.put((index, result, error))

    def next_result(self) -> tuple[int, object, BaseException | None] | None:
        """The next one that ended; None when the batch was halted and nothing is under way any more."""
        while True:
            with self.lock:
                now = self.clock()
                wait_s = min(self.deadlines.values(), default=now + 0.05) - now
            try:
                return self.done.get(timeout=max(0.0, wait_s) + 0.001)
            except queue.Empty:
                self._expire()
                with self.lock:
                    idle = not self.deadlines and self.done.empty()
                if idle and self.halted():
                    return None

    def _expire(self) -> None:
        now = self.clock()
        with self.lock:
            expired = [index for index, deadline in self.deadlines.items() if deadline <= now]
            for index in expired:
                del self.deadlines[index]
        for index in expired:
            result = self.late(self.jobs[index], self.timeout_s)
            self.jobs[index].stop()
            self.done.put((index, result, None))
            self.start_threads(1)

    def let_finish(self, grace_s: float) -> None:
        """Start nothing more, and wait for what is under way."""
        self.stopping = True
        limit = time.monotonic() + grace_s
        if self.deadlines and grace_s:
            logger.warning(
                "interrupted; waiting up to %g s for %d rollouts (again to drop them)", grace_s, len(self.deadlines)
            )
        while self.deadlines and time.monotonic() < limit:
            time.sleep(0.02)

    def finish(self) -> None:
        self.stopping = True
        with self.lock:
            running = tuple(self.deadlines)
        for index in running:
            self.jobs[index].stop()
        limit = time.monotonic() + _GRACE_S
        if running:
            for thread in self.threads:
                thread.join(max(0.0, limit - time.monotonic()))
