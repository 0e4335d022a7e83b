"""Whether the program works at all: what tells one mistake in it from rollouts that went wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from fst_optimizer.rollout.outcome import raised_alike
from fst_optimizer.types import Outcome, Raised, Rollout


class Crashes:
    """Holds back what is to be written of crashed rollouts until one rollout of this process has ended otherwise.

    Crashes that are one mistake in the program must not be written down: once it is corrected, a resumed run runs
    those rollouts again. Thread-safe.

    Args:
        works: Whether the program is known to work from the start: nothing is held back then, or called a mistake.
    """

    def __init__(self, *, works: bool = False) -> None:
        self._works = works
        self._held: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def ended(self, rollout: Rollout, write: Callable[[], None]) -> None:
        """A rollout ended; `write` writes it down, now or as soon as the program is known to work."""
        with self._lock:
            if not self._works and rollout.outcome is Outcome.PROGRAM_ERROR:
                self._held.append(write)
                return
            self._works = True
        self._write_held()  # before what comes after it
        write()

    def mistake(
        self, ran: Sequence[Rollout], *, others: int, num_threads: int, known: Collection[str]
    ) -> Raised | None:
        """What a batch says: the one thing that the program raised everywhere, or None where the run may go on.

        Only the first batch of a process can say so, of a run that is resumed too: the program may have been edited
        in between. What ended before in the same batch says that the program did work, and the few rollouts that were
        under way when it was interrupted may have been the odd ones: then the next batch decides.

        Args:
            ran: The batch's rollouts that this process ran.
            others: How many of the batch had ended before the run was resumed.
            num_threads: How many may have been under way when the run was interrupted.
            known: What the run has seen the program raise before (`str(Raised)`): such crashes are data.
        """
        if self._works or not ran:
            return None
        raised = raised_alike(ran)
        new = raised is not None and str(raised) not in known
        if new and (not others or len(ran) > num_threads):
            with self._lock:
                self._held.clear()
            return raised
        if not new:
            self._works = True
            self._write_held()
        return None  # and where it may be one mistake after all, the next batch says more

    def _write_held(self) -> None:
        with self._lock:
            held, self._held = self._held, []
        for write in held:
            write()
