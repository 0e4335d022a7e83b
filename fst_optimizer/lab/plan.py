"""Which runs a comparison or a sweep is made of, and where each of them lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import GIVEN, read_config
from fst_optimizer.config.overrides import flat
from fst_optimizer.config.run import METHODS, FSTConfig
from fst_optimizer.config.section import merged
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflection_lm import recorded_name
from fst_optimizer.lab.methods import BASELINES, SFT, engine_of, parts_of, plain
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.run.record import MAY_MOVE
from fst_optimizer.store.files import RunFiles
from fst_optimizer.task_run import RunPlan, RunRequest, Sizes, plan_run, reflection_lm_of, reflection_name

MAY_DIFFER = tuple(f"{name.removeprefix('config.')}." for name in MAY_MOVE if name.startswith("config."))
"""Settings that a finished run of a comparison may have otherwise: they do not change what is learned."""
MANY_CYCLES = 100_000
"""The cap of rollouts ends a comparison's runs, not a number of cycles."""


@dataclass(frozen=True)
class Common:
    """What all runs of a comparison share."""

    max_rollouts: int
    """Fast and slow rollouts of each run."""
    sets: tuple[str, ...] = ()
    """`NAME=VALUE` for every run."""
    model: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    config_file: Path | None = None
    reflection_lm: str | None = None
    """None: the task's own."""


@dataclass(frozen=True)
class Job:
    """One run to make."""

    task: str
    method: str
    """A method, METHOD@ENGINE, or METHOD+LABEL for one with settings of its own."""
    seed: int
    folder: Path
    common: Common
    sets: tuple[str, ...] = ()
    """`NAME=VALUE` for this run, over the common ones."""
    instructions: Path | None = None
    """A JSON file of what the program starts from. None: its own."""
    start_from: Path | None = None
    """A finished run whose weights it begins with. None: the base's."""

    @property
    def label(self) -> str:
        """Names the run in messages: `VARIANT/METHOD-seedN`."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def plain_method(self) -> str:
        """The method without engine and label."""
        return plain(self.method)

    @property
    def request(self) -> RunRequest:
        """The run as `fst compile` sees it."""
        flags: dict[str, Any] = {"seed": self.seed, "budget.max_cycles": MANY_CYCLES}
        if self.plain_method in METHODS:
            flags["method"] = self.plain_method
        return RunRequest(
            task=self.task,
            run_dir=self.folder,
            model=self.common.model,
            engine=engine_of(self.method),
            reflection_lm=self.common.reflection_lm,
            config_file=self.common.config_file,
            flags=flags,
            sets=(f"budget.max_rollouts={self.common.max_rollouts}", *self.common.sets, *self.sets),
            sizes=self.common.sizes,
            instructions=self.instructions,
            start_from=self.start_from,
        )

    def command(self) -> list[str]:
        """The same as a module with arguments: `fst compile`, or the module of a baseline."""
        request = self.request
        options: list[tuple[str, Any]] = [
            ("--run-dir", request.run_dir),
            ("--method", self.plain_method),
            ("--engine", request.engine),
            *(("--set", f"{name}={value}") for name, value in request.flags.items() if name != "method"),
            ("--model", request.model),
            ("--reflection-lm", request.reflection_lm),
            ("--instructions", request.instructions),
            ("--config", request.config_file),
            ("--start-from", request.start_from),
            *((f"--{split}-size", size) for split, size in asdict(request.sizes).items()),
            *(("--set", pair) for pair in request.sets),
        ]
        given = [text for name, value in options if value is not None for text in (name, str(value))]
        if self.plain_method in BASELINES:
            return [BASELINES[self.plain_method], self.task, *given]
        begun = RunFiles(self.folder).config.exists()
        return ["fst_optimizer.cli.main", "compile", self.task, *given, *(["--resume"] if begun else [])]


def variant_name(task: str) -> str:
    """The folder of a task's runs: its variant, else the last part of its name; a kind of feedback stays behind its +.

    Dots stay too, so that rules that are spelled otherwise have other folders.
    """
    place, _, variant = task.partition(":")
    rule, plus, kind = variant.partition("+")
    name = rule or re.split(r"[/.]", place.rstrip("/"))[-1]
    return re.sub(r"[^\w.+-]+", "-", name + plus + kind).strip("-.") or "task"


def by_folder(tasks: Iterable[str]) -> dict[str, str]:
    """Folder name -> task.

    Raises:
        UserError: two tasks would share a folder.
    """
    found: dict[str, str] = {}
    for task in tasks:
        name = variant_name(task)
        if found.setdefault(name, task) != task:
            raise UserError(f"tasks {found[name]!r} and {task!r} would share the folder {name!r}: compare them apart")
    return found


def parse_rates(text: str) -> tuple[float, ...]:
    """`3e-4,1e-3` as learning rates."""
    try:
        return tuple(float(part) for part in parts_of(text))
    except ValueError:
        raise UserError(f"--lrs is {text!r}: give numbers like 3e-4,1e-3") from None


def check_jobs(jobs: Sequence[Job]) -> None:
    """Every run can be made, and those that lie there were made with these settings.

    Raises:
        UserError: a setting is wrong, or a folder holds another run.
    """
    names: dict[str, str | None] = {}
    for job in jobs:
        plan = plan_run(job.request)
        if job.task not in names:  # once a task: its reflection LM may be a model to load
            plan.task.build_program()
            reflection_lm_of(job.request, plan)
            names[job.task] = reflection_name(job.request, plan)
        if job.plain_method == SFT and plan.task.answers(plan.task.load("train", 1)[0]) is None:
            raise UserError(
                f"--methods has {job.method!r}, which learns from right answers, and the task {job.task!r} tells none: "
                "give its task.py answers(example, variant=None) -> {predictor: {field: text}}, or leave sft out"
            )
        if RunFiles(job.folder).config.exists():
            _check_same(job, plan, names[job.task])


def _check_same(job: Job, plan: RunPlan, reflection_lm: str | None) -> None:
    """Raises UserError where the job's folder holds a run of another task, or with other settings."""
    recorded = read_config(RunFiles(job.folder).config)
    program = recorded.get("program") or {}
    # A setting that there was not yet when the run began had what is its default now.
    before = {
        "task": recorded["task"],
        **flat(merged(FSTConfig().to_dict(), recorded["config"])),
        **asdict(Sizes().over(recorded)),
        "reflection_lm": recorded_name(recorded),
        "instructions": program.get("instructions") if program.get(GIVEN) else None,
    }
    now = {
        "task": job.task,
        **flat(plan.settings.config.to_dict()),
        **asdict(job.common.sizes.over(recorded)),
        "reflection_lm": reflection_lm,
        "instructions": plan.instructions and {**seed_texts(plan.task.build_program()), **plan.instructions},
    }
    other = [
        f"{name} {before.get(name)!r}, not {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and not f"{name}.".startswith(MAY_DIFFER)
    ]
    if other:
        raise UserError(f"{job.folder} holds another run ({'; '.join(other)}): give another --out")
