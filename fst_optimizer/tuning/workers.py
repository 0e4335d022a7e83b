"""The workers of a study as processes: started, watched, started again where they were killed, and stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.store.files import read_json, write_json
from fst_optimizer.task_run import Choices, Sizes, make_policy, plan_run
from fst_optimizer.tuning.ask import Ask
from fst_optimizer.tuning.rows import row_json
from fst_optimizer.tuning.standing import Limits, Seen, finished, room, seen
from fst_optimizer.tuning.storage import open_storage, quiet_optuna
from fst_optimizer.tuning.study import plan_of
from fst_optimizer.tuning.work import Work
from fst_optimizer.tuning.worker import POLL_S, STORAGE_VARIABLE, Manner, StudyStopped, work_on

if TYPE_CHECKING:
    from optuna import Study

    from fst_optimizer.config.policy import LoraConfig
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.tuning.table import Lines

COMMAND = "command.json"
DEATHS = 3
"""Deaths of a worker in a row, without a trial that ended in between, after which it is not started again."""
TAIL_LINES = 6


def run_workers(ask: Ask, limits: Limits, study: Study, lines: Lines) -> None:
    """Have workers run the trials that are missing.

    Raises:
        StudyStopped: a worker gave up; its words are in the text.
        KeyboardInterrupt: the workers were stopped; what they were at is in the queue again.
    """
    if room(_seen(study), limits) == "done":
        return
    with _workers(ask) as workers:
        while True:
            lines.update(_rows(study))
            for one in workers:
                one.look(study)
            if all(one.over for one in workers):
                break
            time.sleep(POLL_S)
        lines.update(_rows(study))
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
                [sys.executable, "-m", "fst_optimizer.cli.tune_worker", str(self.ask.folder), str(self.number)],
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


# -- in a worker's own process ----------------------------------------------------------------------------------


def run_worker(folder: Path, number: int) -> None:
    """What a worker process does."""
    import optuna

    data = read_json(folder / COMMAND)
    choices = _choices(data["choices"])
    storage = open_storage(os.environ[STORAGE_VARIABLE], data["heartbeat_s"])
    with quiet_optuna():
        study = optuna.load_study(study_name=data["study"], storage=storage)
    plan = plan_of(study)
    limits = Limits(data["trials"], plan.cap, data["budget_rollouts"])
    manner = Manner(data["sampler"], data["pruner"], number)
    parent = os.getppid()

    def go_on(_: Study) -> None:
        if os.getppid() != parent:
            raise KeyboardInterrupt  # the command that started this was killed

    work_on(study, plan, task_work(choices, number), folder, limits, manner, go_on)


def _choices(data: Mapping[str, Any]) -> Choices:
    paths = {name: None if data[name] is None else Path(data[name]) for name in ("run_dir", "config_file")}
    return Choices(**{**data, **paths, "sizes": Sizes(**data["sizes"]), "sets": tuple(data["sets"])})


def task_work(choices: Choices, number: int = 0) -> Work:
    """A task as the work of a study."""
    plan = plan_run(choices)
    own = replace(choices, run_dir=choices.run_dir / f"worker-{number}")

    def policy(lora: LoraConfig) -> Policy:
        if choices.engine == "vllm":  # its server writes a log there
            own.run_dir.mkdir(parents=True, exist_ok=True)
        return make_policy(own, replace(plan, settings=replace(plan.settings, lora=lora)))

    return Work(
        choices.task,
        plan.task.build_program,
        plan.task.metric,
        plan.task.load("train", choices.sizes.train),
        plan.task.load("val", choices.sizes.val),
        policy,
    )
