"""Which runs a comparison or a sweep is made of, and where each of them lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.overrides import assignments, flat
from fst_optimizer.config.policy import ENGINES
from fst_optimizer.config.run import METHODS
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.evolve.reflection_lm import recorded_name
from fst_optimizer.store.files import RunFiles
from fst_optimizer.task_run import RunRequest, Sizes, plan_run, reflection_lm_of, reflection_name

DSPY_METHODS = ("dspy-gepa", "dspy-grpo", "dspy-together")
"""DSPy's own optimizers on our policy: see `dspy_methods`."""
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

    @property
    def label(self) -> str:
        """Names the run in messages: `VARIANT/METHOD-seedN`."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def plain_method(self) -> str:
        """The method without engine and label."""
        return re.split("[@+]", self.method)[0]

    @property
    def request(self) -> RunRequest:
        """The run as `fst compile` sees it."""
        _, _, engine = self.method.partition("+")[0].partition("@")
        flags: dict[str, Any] = {"seed": self.seed, "budget.max_cycles": MANY_CYCLES}
        if self.plain_method in METHODS:
            flags["method"] = self.plain_method
        return RunRequest(
            task=self.task,
            run_dir=self.folder,
            model=self.common.model,
            engine=engine or None,
            reflection_lm=self.common.reflection_lm,
            config_file=self.common.config_file,
            flags=flags,
            sets=(f"budget.max_rollouts={self.common.max_rollouts}", *self.common.sets, *self.sets),
            sizes=self.common.sizes,
        )

    def command(self) -> list[str]:
        """The same as a module with arguments: `fst compile`, or the runner of DSPy's own optimizers."""
        request = self.request
        options: list[tuple[str, Any]] = [
            ("--run-dir", request.run_dir),
            ("--method", self.plain_method),
            ("--engine", request.engine),
            *(("--set", f"{name}={value}") for name, value in request.flags.items() if name != "method"),
            ("--model", request.model),
            ("--reflection-lm", request.reflection_lm),
            ("--config", request.config_file),
            *((f"--{split}-size", size) for split, size in asdict(request.sizes).items()),
            *(("--set", pair) for pair in request.sets),
        ]
        given = [text for name, value in options if value is not None for text in (name, str(value))]
        if self.plain_method in DSPY_METHODS:
            return ["fst_optimizer.lab.dspy_methods", self.task, *given]
        begun = RunFiles(self.folder).config.exists()
        return ["fst_optimizer.cli.main", "compile", self.task, *given, *(["--resume"] if begun else [])]


def variant_name(task: str) -> str:
    """The folder of a task's runs: its variant, else the last part of its name."""
    place, _, variant = task.partition(":")
    name = variant or re.split(r"[/.]", place.rstrip("/"))[-1]
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "task"


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


def parse_methods(text: str) -> tuple[str, ...]:
    """`fst,rl` as names; `fst@vllm` is on another engine than torch, `rl+own` has settings of its own."""
    names = _parts(text)
    for name in names:
        plain, plus, label = name.partition("+")
        if plus and not re.fullmatch(r"[\w-]+", label):
            raise UserError(f"--methods has {name!r}: give a label of letters, digits and dashes after the +")
        method, at, engine = plain.partition("@")
        if method not in (*METHODS, *DSPY_METHODS):
            raise UserError(f"--methods has {name!r}: {did_you_mean(method, (*METHODS, *DSPY_METHODS))}")
        if at and (engine not in ENGINES or method in DSPY_METHODS):
            raise UserError(f"--methods has {name!r}: {did_you_mean(engine, ENGINES)}")
    return names


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    parts = _parts(text)
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seeds is {text!r}: give whole numbers like 0,1,2")
    return tuple(int(part) for part in parts)


def parse_rates(text: str) -> tuple[float, ...]:
    """`3e-4,1e-3` as learning rates."""
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError:
        raise UserError(f"--lrs is {text!r}: give numbers like 3e-4,1e-3") from None


def by_method(pairs: Iterable[str], under: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """`rl.train.lr=2e-3` strings as method -> `train.lr=2e-3` strings, behind those that are there already."""
    found = {method: list(sets) for method, sets in (under or {}).items()}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if re.split("[@+]", method)[0] not in (*METHODS, *DSPY_METHODS) or not dot:
            raise UserError(f"--set-method is {pair!r}: give METHOD.NAME=VALUE, e.g. rl.train.lr=2e-3")
        assignments([rest])
        found.setdefault(method, []).append(rest)
    return found


def check_jobs(jobs: Sequence[Job]) -> None:
    """Every run can be made, and those that lie there were made with these settings.

    Raises:
        UserError: a setting is wrong, or a folder holds another run.
    """
    for job in jobs:
        plan = plan_run(job.request)
        config, reflection_lm = plan.settings.config, reflection_name(job.request, plan)
        if reflection_lm is not None and job.plain_method in DSPY_METHODS:
            raise UserError(
                f"--methods has {job.method!r}, which writes instructions without an LM here, and the reflection LM is "
                f"{reflection_lm!r}: leave one of both out"
            )
        reflection_lm_of(job.request, plan)
        path = RunFiles(job.folder).config
        if not path.exists():
            continue
        recorded = read_config(path)
        named = {"reflection_lm": recorded_name(recorded)}
        before = {"task": recorded["task"], **flat(recorded["config"]), **asdict(Sizes().over(recorded)), **named}
        now = {"task": job.task, **flat(config.to_dict()), **asdict(job.common.sizes.over(recorded))}
        now["reflection_lm"] = reflection_lm
        other = [
            f"{name} {before.get(name)!r}, not {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if other:
            raise UserError(f"{job.folder} holds another run ({'; '.join(other)}): give another --out")


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{text!r} names nothing: give values separated by commas")
    return parts
