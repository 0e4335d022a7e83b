"""The workers of a study as processes: started, restarted where they were killed, and stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fst_optimizer.children import start_child
from fst_optimizer.tuning.admission import admission, finished
from fst_optimizer.tuning.request import TuneRequest
from fst_optimizer.tuning.study import StudyPlan
from fst_optimizer.tuning.summary import rows_of
from fst_optimizer.tuning.worker import POLL_S, STORAGE_VARIABLE, StudyStopped

if TYPE_CHECKING:
    from optuna import Study

ShowRows = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes the study's trials as they are now."""
DEATHS = 3
"""Deaths of a worker in a row, without a trial that ended in between, after which it is not started again."""
TAIL_LINES = 6


def run_workers(request: TuneRequest, plan: StudyPlan, study: Study, show_rows: ShowRows) -> None:
    """Have workers run the trials that are missing.

    Raises:
        StudyStopped: a worker gave up; the text has its reason.
        KeyboardInterrupt: the workers were stopped; their trials are in the queue again.
    """

    def is_done() -> bool:
        return admission(study.get_trials(deepcopy=False), request.limits(plan)) == "done"

    if is_done():
        return
    with _workers(request) as workers:
        while not all(worker.over for worker in workers):
            show_rows(rows_of(study))
            time.sleep(POLL_S)
            for worker in workers:
                worker.check(study)
        show_rows(rows_of(study))
    failed = [worker for worker in workers if worker.process.returncode]
    if failed and not is_done():
        raise StudyStopped(failed[0].log_tail())


class _Worker:
    """A worker process. It is started again where it was killed; the study notices by itself that its trial is lost."""

    def __init__(self, request: TuneRequest, number: int) -> None:
        self.request = request
        self.number = number
        self.log = request.folder / f"worker-{number}.log"
        self.deaths = 0
        self.finished_at_death = -1
        self.over = False
        self.process = self._start()

    def check(self, study: Study) -> None:
        """See whether it ended, and start it again where it was killed."""
        code = self.process.poll()
        if code is None or self.over:
            return
        if code < 0:  # by a signal
            trials = finished(study.get_trials(deepcopy=False))
            self.deaths = self.deaths + 1 if trials == self.finished_at_death else 1
            self.finished_at_death = trials
            if self.deaths < DEATHS:
                self.process = self._start()
                return
        self.over = True

    def log_tail(self) -> str:
        """Why it failed: the reason that it gave, or the end of its log."""
        if self.deaths >= DEATHS:
            return f"worker {self.number} was killed {DEATHS} times in a row; see {self.log}"
        lines = self.log.read_text(errors="replace").splitlines()
        reasons = [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
        return reasons[-1] if reasons else "\n".join([f"worker {self.number}:", *lines[-TAIL_LINES:]])

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, STORAGE_VARIABLE: self.request.url}
        if self.request.workers > 1:
            # Several torch processes with all cores each are slower than one after the other.
            environment.setdefault("OMP_NUM_THREADS", "1")
        with self.log.open("ab") as log:
            return start_child(
                [sys.executable, "-m", str(__package__), str(self.request.folder), str(self.number)],
                environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process, which then stops them, once
            )


@contextmanager
def _workers(request: TuneRequest) -> Iterator[list[_Worker]]:
    """The workers, of which none outlives the context, or this process."""
    running: list[_Worker] = []
    try:
        running += [_Worker(request, number) for number in range(request.workers)]
        yield running
    finally:
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.wait()
