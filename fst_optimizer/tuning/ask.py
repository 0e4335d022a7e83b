"""What a study is asked for, looked up and checked: nothing here costs a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.errors import UserError
from fst_optimizer.task_run import Choices, Sizes, plan_run
from fst_optimizer.tuning.grid import planned_rollouts
from fst_optimizer.tuning.objectives import parse_objectives
from fst_optimizer.tuning.pruning import check_pruner
from fst_optimizer.tuning.samplers import check_sampler
from fst_optimizer.tuning.space import default_space, read_space
from fst_optimizer.tuning.space_check import check_space
from fst_optimizer.tuning.standing import Limits
from fst_optimizer.tuning.storage import HEARTBEAT_S
from fst_optimizer.tuning.study import Plan, study_name

if TYPE_CHECKING:
    from fst_optimizer.tasks import Task

PRESETS = ("light", "medium", "heavy")
MANY_CYCLES = 100_000
"""The cap of rollouts ends a trial, not a number of cycles."""


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

    plan: Plan
    presets: Mapping[str, Settings]
    """What to try first. The first is what the winner is compared with."""
    limits: Limits


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
    first = preset_name(run_plan.task.config() is not None, ask.choices.auto)
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
    return Prepared(plan, presets, Limits(ask.trials, cap, ask.budget_rollouts))


def preset_name(own: bool, auto: str | None) -> str:
    """What the settings under a study are called.

    Args:
        own: Whether the task, or the caller, has settings of its own.
        auto: The preset that was asked for.
    """
    return "own settings" if own and auto is None else f"preset {auto or 'light'}"


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
