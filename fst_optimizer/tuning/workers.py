"""The workers of a study as processes: started, watched, started again where they were killed, and stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.store.files import write_json
from fst_optimizer.tuning.ask import Ask
from fst_optimizer.tuning.rows import row_json
from fst_optimizer.tuning.standing import Limits, Seen, finished, room, seen
from fst_optimizer.tuning.worker import COMMAND, POLL_S, STORAGE_VARIABLE, StudyStopped

if TYPE_CHECKING:
    from optuna import Study

ShowRows = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes the study's trials as they are now."""
DEATHS = 3
"""Deaths of a worker in a row, without a trial that ended in between, after which it is not started again."""
TAIL_LINES = 6


def run_workers(ask: Ask, limits: Limits, study: Study, show_rows: ShowRows) -> None:
    """Have workers run the trials that are missing.

    Raises:
        StudyStopped: a worker gave up; its words are in the text.
        KeyboardInterrupt: the workers were stopped; what they were at is in the queue again.
    """
    if room(_seen(study), limits) == "done":
        return
    with _workers(ask) as workers:
        while True:
            show_rows(_rows(study))
            for one in workers:
                one.look(study)
            if all(one.over for one in workers):
                break
            time.sleep(POLL_S)
        show_rows(_rows(study))
    failed = [one for one in workers if one.failed]
    if failed and room(_seen(study), limits) != "done":
        raise StudyStopped(failed[0].last_words())


def _seen(study: Study) -> list[Seen]:
    return seen(study.get_trials(deepcopy=False))


class _Worker:
    """A worker process; one that is killed is started again, and the study finds out about its trial by itself."""

    def __init__(self, ask: Ask, number: int) -> None:
        self.ask = ask
        self.number = number
        self.log = ask.folder / f"worker-{number}.log"
        self.deaths = 0
        self.ended_before = -1
        self.failed = False
        self.over = False
        self.process = self._start()

    def look(self, study: Study) -> None:
        """See whether it ended, and start it again where it was killed."""
        code = self.process.poll()
        if code is None or self.over:
            return
        if code >= 0:
            self.over, self.failed = True, code != 0
            return
        ended = finished(_seen(study))
        self.deaths = self.deaths + 1 if ended == self.ended_before else 1
        self.ended_before = ended
        if self.deaths >= DEATHS:
            self.over = self.failed = True
            return
        self.process = self._start()

    def last_words(self) -> str:
        """The end of its log."""
        if self.deaths >= DEATHS:
            return f"worker {self.number} was killed {DEATHS} times in a row; see {self.log}"
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("failed: ", "error: "))]
        return told[-1].partition(": ")[2] if told else "\n".join([f"worker {self.number}:", *lines[-TAIL_LINES:]])

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, STORAGE_VARIABLE: self.ask.url}
        if self.ask.workers > 1:
            # Several torch processes with all cores each are slower than one after the other.
            environment.setdefault("OMP_NUM_THREADS", "1")
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", __package__, str(self.ask.folder), str(self.number)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which then stops them, once
            )


@contextmanager
def _workers(ask: Ask) -> Iterator[list[_Worker]]:
    """The workers, of which none outlives the context."""
    running: list[_Worker] = []
    try:
        running += [_Worker(ask, number) for number in range(ask.workers)]
        yield running
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _rows(study: Study) -> list[dict[str, Any]]:
    return [row_json(trial) for trial in study.get_trials(deepcopy=False)]


def write_command(ask: Ask) -> None:
    """What the workers read. The storage's URL is left out: it may have a password in it."""
    choices = asdict(ask.choices)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in choices.items()}
    kept = ("trials", "study", "sampler", "pruner", "budget_rollouts", "heartbeat_s", "workers")
    data = {"choices": {**plain, "sets": list(ask.choices.sets)}, **{name: getattr(ask, name) for name in kept}}
    write_json(ask.folder / COMMAND, data)
