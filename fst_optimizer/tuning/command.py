"""`fst tune`: a task's study, with worker processes of its own, and what comes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.run.files import RunFiles, read_json, write_json
from fst_optimizer.settings import Settings
from fst_optimizer.task_run import Choices, Sizes, make_policy, plan_run
from fst_optimizer.tuning import noise, output
from fst_optimizer.tuning.grid import planned_rollouts
from fst_optimizer.tuning.objectives import parse_objectives
from fst_optimizer.tuning.pruning import check_pruner
from fst_optimizer.tuning.samplers import check_sampler
from fst_optimizer.tuning.space import check_space, default_space, read_space
from fst_optimizer.tuning.standing import Limits, finished, room, seen
from fst_optimizer.tuning.study import (
    HEARTBEAT_S,
    Plan,
    check_folder,
    open_storage,
    open_study,
    plan_of,
    quiet_optuna,
    study_name,
)
from fst_optimizer.tuning.worker import POLL_S, STORAGE_VARIABLE, Manner, StudyStopped, work_on

if TYPE_CHECKING:
    from optuna import Study

    from fst_optimizer.lab.launch import Tell
    from fst_optimizer.tasks import Task
    from fst_optimizer.tuning.table import Lines
    from fst_optimizer.tuning.work import Work

PRESETS = ("light", "medium", "heavy")
MANY_CYCLES = 100_000
"""The cap of rollouts ends a trial, not a number of cycles."""
COMMAND = "command.json"
DEATHS = 3
"""Deaths of a worker in a row, without a trial that ended in between, after which it is not started again."""
TAIL_LINES = 6


@dataclass(frozen=True)
class Ask:
    """What `fst tune` was asked for."""

    choices: Choices
    """As for `fst compile`; its `run_dir` is the study's folder."""
    trials: int
    """N."""
    study: str
    storage: str | None = None
    """None: SQLite in the folder."""
    workers: int = 1
    sampler: str = "tpe"
    pruner: str = "hyperband"
    objectives: tuple[str, ...] = ("score",)
    budget_rollouts: int | None = None
    repeats: int = 0
    space: Mapping[str, Any] = field(default_factory=default_space)
    heartbeat_s: int = HEARTBEAT_S

    @property
    def folder(self) -> Path:
        """The study's."""
        return self.choices.run_dir

    @property
    def url(self) -> str:
        """The storage's."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"


@dataclass(frozen=True)
class Prepared:
    """The same, looked up and checked; nothing was spent."""

    task: Task
    plan: Plan
    presets: Mapping[str, Settings]
    """What to try first. The first is what the winner is compared with."""
    limits: Limits


def need_tune() -> None:
    """The extra `tune` is there.

    Raises:
        UserError: says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
        import plotly  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fst-optimizer[tune]'") from error


def make_ask(
    choices: Choices,
    *,
    trials: int,
    study: str | None,
    folder: Path | None,
    seed: int,
    objectives: str,
    space_file: Path | None,
    **rest: Any,
) -> Ask:
    """What the options say; the study is named after task and seed, and its folder after the study."""
    name = study or study_name(choices.task, seed)
    space = read_space(space_file) if space_file else default_space()
    choices = replace(choices, run_dir=folder or Path("runs") / f"tune-{name}")
    return Ask(choices, trials, name, objectives=parse_objectives(objectives), space=space, **rest)


def prepare(ask: Ask) -> Prepared:
    """Find the task, settle what all trials share, and check everything that can be checked before the first trial.

    Raises:
        UserError: something is wrong; the text names it, its value and the remedy.
    """
    check_numbers(ask.trials, ask.workers, ask.budget_rollouts, ask.repeats)
    check_sampler(ask.sampler, len(ask.objectives))
    check_pruner(ask.pruner)
    if ask.repeats and ask.choices.url:
        raise UserError(f"repeats is {ask.repeats} and --url is given: repeats start their own engines; leave one out")
    run_plan = plan_run(ask.choices)
    base, cap = capped(run_plan.settings)
    check_space(ask.space, base)
    check_budget(ask.budget_rollouts, cap)
    first = _first_name(run_plan.task.config() is not None, ask.choices.auto)
    others = {name: plan_run(replace(ask.choices, auto=name)).settings for name in PRESETS}
    presets = {first: base, **{f"preset {name}": capped(settings, cap)[0] for name, settings in others.items()}}
    plan = Plan(
        ask.choices.task,
        base,
        ask.space,
        ask.objectives,
        cap,
        _data(run_plan.task, ask.choices.sizes),
        Path(ask.choices.model or str(run_plan.task.model())).name,
    )
    return Prepared(run_plan.task, plan, presets, Limits(ask.trials, cap, ask.budget_rollouts))


def _first_name(own: bool, auto: str | None) -> str:
    return "the task's own settings" if own and auto is None else f"preset {auto or 'light'}"


def capped(settings: Settings, cap: int | None = None) -> tuple[Settings, int]:
    """Settings of which a run ends at a number of training rollouts: by default what it would have spent anyway."""
    cap = planned_rollouts(settings.config) if cap is None else cap
    config = settings.config.with_values({"budget.max_rollouts": cap, "budget.max_cycles": MANY_CYCLES})
    return replace(settings, config=config), cap


def check_numbers(trials: int, workers: int = 1, budget: int | None = None, repeats: int = 0) -> None:
    """Counts are counts.

    Raises:
        UserError: one is not.
    """
    for name, value, least in (("trials", trials, 1), ("workers", workers, 1), ("repeats", repeats, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} is {value!r}: give a whole number of at least {least}")
    if budget is not None and (not isinstance(budget, int) or budget < 1):
        raise UserError(f"budget_rollouts is {budget!r}: give a whole number of at least 1, or leave it out")


def check_budget(budget: int | None, cap: int) -> None:
    """The budget pays for a trial.

    Raises:
        UserError: it does not.
    """
    if budget is not None and budget < cap:
        raise UserError(
            f"budget_rollouts is {budget}, and one trial may take {cap}: give more, or cap trials lower by "
            "budget.max_rollouts"
        )


def _data(task: Task, sizes: Sizes) -> dict[str, Any]:
    from fst_optimizer.run.record import digest
    from fst_optimizer.types import items_of

    splits = {"train": task.load("train", sizes.train), "val": task.load("val", sizes.val)}
    return {split: digest(items_of(examples, split)) for split, examples in splits.items()}


# -- the study --------------------------------------------------------------------------------------------------


def join_study(ask: Ask, prepared: Prepared) -> Study:
    """The study, made or found, and what its workers need in its folder.

    Raises:
        UserError: the storage cannot be reached, or the study is another one.
    """
    if ask.storage is None:
        ask.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(ask.url, ask.heartbeat_s)
    study, fresh = open_study(storage, ask.study, prepared.plan, prepared.presets)
    check_folder(ask.folder, fresh)
    ask.folder.mkdir(parents=True, exist_ok=True)
    write_json(ask.folder / "space.json", dict(ask.space))
    write_json(ask.folder / COMMAND, _command_json(ask))
    return study


def _command_json(ask: Ask) -> dict[str, Any]:
    """For the workers. The storage's URL is left out: it may have a password in it."""
    choices = asdict(ask.choices)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in choices.items()}
    kept = ("trials", "study", "sampler", "pruner", "budget_rollouts", "heartbeat_s", "workers")
    return {"choices": {**plain, "sets": list(ask.choices.sets)}, **{name: getattr(ask, name) for name in kept}}


def tune_task(ask: Ask, prepared: Prepared, study: Study, lines: Lines) -> None:
    """Have workers run the trials that are missing.

    Raises:
        StudyStopped: a worker gave up; its words are in the text.
        KeyboardInterrupt: the workers were stopped; what they were at is in the queue again.
    """
    if room(_seen(study), prepared.limits) == "done":
        return
    with _workers(ask) as workers:
        while True:
            lines.update(output.rows_of(study.get_trials(deepcopy=False)))
            for one in workers:
                one.look(study)
            if all(one.over for one in workers):
                break
            time.sleep(POLL_S)
        lines.update(output.rows_of(study.get_trials(deepcopy=False)))
    failed = [one for one in workers if one.failed]
    if failed and room(_seen(study), prepared.limits) != "done":
        raise StudyStopped(failed[0].last_words())


def _seen(study: Study) -> list[Any]:
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
                [sys.executable, "-m", __package__ + ".worker", str(self.ask.folder), str(self.number)],
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


# -- a worker process -------------------------------------------------------------------------------------------


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
    from fst_optimizer.tuning.work import Work

    plan = plan_run(choices)
    own = replace(choices, run_dir=choices.run_dir / f"worker-{number}")

    def policy(lora: Any) -> Any:
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


# -- afterwards -------------------------------------------------------------------------------------------------


def finish(ask: Ask, prepared: Prepared, study: Study, command: str, tell: Tell) -> dict[str, Any]:
    """More seeds where they are asked for, then the files; the study's summary."""
    summary = {**output.summarized(study, prepared.plan), "command": command}
    if ask.repeats and summary["best"] is not None:
        summary.update(confirmed(summary, prepared, ask.folder, ask.repeats, task_runs(ask, prepared, tell)))
    paths = output.write_outputs(study, prepared.plan, summary, ask.folder)
    return {**summary, "paths": [str(path) for path in paths]}


def confirmed(
    summary: Mapping[str, Any], prepared: Prepared, folder: Path, count: int, run_all: noise.RunAll
) -> dict[str, Any]:
    """The leading configurations with more seeds, the one that wins, and that one beside the preset."""
    plan, seed = prepared.plan, prepared.plan.settings.config.seed
    leading = {row["trial"]: output.trial_settings(row["params"], plan) for row in noise.leading(summary["trials"])}
    repeats = {
        trial: noise.repeats_of(f"trial-{trial:06d}", settings, folder / "repeats", seed + noise.REPEAT_SEEDS, count)
        for trial, settings in leading.items()
    }
    run_all([repeat for some in repeats.values() for repeat in some])
    scores = {trial: noise.read_scores(some, "val") for trial, some in repeats.items()}
    best = noise.pick(scores)
    name, preset = next(iter(prepared.presets.items()))
    first = seed + noise.CONFIRM_SEEDS
    found: dict[str, Any] = {
        "best": best,
        "repeats": [{"trial": trial, "scores": some, **(noise.summary(some) or {})} for trial, some in scores.items()],
    }
    sides = {
        "best": noise.repeats_of(f"trial-{best:06d}", leading[best], folder / "confirm", first, count),
        "preset": noise.repeats_of("preset", preset, folder / "confirm", first, count),
    }
    run_all([*sides["best"], *sides["preset"]])
    ours, theirs = (noise.read_scores(sides[side], "test") for side in ("best", "preset"))
    about = {"name": name, "seeds": [repeat.settings.config.seed for repeat in sides["best"]]}
    return {**found, "confirmation": {**about, **noise.comparison(ours, theirs)}}


def task_runs(ask: Ask, prepared: Prepared, tell: Tell) -> noise.RunAll:
    """Makes runs as `fst compile` would, some at a time."""
    from fst_optimizer.lab.launch import run_all
    from fst_optimizer.lab.plan import Common, Job

    def run(repeats: Sequence[noise.Repeat]) -> None:
        jobs = []
        for repeat in repeats:
            path = repeat.folder.parent / f"{repeat.label}.json"
            write_json(path, output.settings_json(repeat.settings))
            config, choices = repeat.settings.config, ask.choices
            method = f"{config.method}@{choices.engine}" if choices.engine else config.method
            sets = tuple(pair for pair in choices.sets if pair.startswith("vllm."))
            common = Common(prepared.plan.cap, sets, choices.model, choices.sizes, path)
            jobs.append(Job(choices.task, method, config.seed, repeat.folder, common))
        run_all(jobs, at_once=ask.workers, tell=tell)

    return run


def remove_unfinished(folder: Path) -> None:
    """A run in the study's own folder that did not end is begun again."""
    if folder.exists() and not RunFiles(folder).result.exists():
        shutil.rmtree(folder)
