"""What a study is asked for, looked up and checked: nothing here spends a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.errors import UserError
from fst_optimizer.task_run import RunRequest, plan_run
from fst_optimizer.tuning.admission import Limits
from fst_optimizer.tuning.grid import planned_rollouts
from fst_optimizer.tuning.objectives import parse_objectives
from fst_optimizer.tuning.pruning import check_pruner
from fst_optimizer.tuning.samplers import check_sampler
from fst_optimizer.tuning.space import default_space
from fst_optimizer.tuning.space_check import check_space
from fst_optimizer.tuning.storage import HEARTBEAT_S, has_heartbeat, open_storage
from fst_optimizer.tuning.study import StudyPlan, open_study, study_name

if TYPE_CHECKING:
    import dspy
    from optuna import Study

PRESETS = ("light", "medium", "heavy")
MANY_CYCLES = 100_000
"""The cap of rollouts ends a trial, not a number of cycles."""


@dataclass(frozen=True)
class TuneRequest:
    """What `fst tune` or `fst_optimizer.tune` was asked for, but for the program and its settings.

    Raises:
        UserError: something in it is wrong; names it, its value and the remedy.
    """

    trials: int
    """Finished trials that the study shall have."""
    study: str
    folder: Path
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", parse_objectives(self.objectives))
        for name, least in (("trials", 1), ("workers", 1), ("repeats", 0), ("budget_rollouts", 1)):
            value = getattr(self, name)
            if name == "budget_rollouts" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                remedy = ", or leave it out" if name == "budget_rollouts" else ""
                raise UserError(f"{name} is {value!r}: give a whole number of at least {least}{remedy}")
        check_sampler(self.sampler, len(self.objectives))
        check_pruner(self.pruner)

    @property
    def url(self) -> str:
        """The storage's."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    @property
    def has_heartbeat(self) -> bool:
        """Whether the storage notices that a worker was killed."""
        return has_heartbeat(self.url)

    def limits(self, plan: StudyPlan) -> Limits:
        """When the study has enough."""
        return Limits(self.trials, plan.cap, self.budget_rollouts)


def make_request(task: str, seed: int, *, study: str | None, folder: str | Path | None, **rest: Any) -> TuneRequest:
    """A request. By default the study is named after task and seed, and its folder after the study."""
    name = study or study_name(task, seed)
    return TuneRequest(study=name, folder=Path(folder or Path("runs") / f"tune-{name}"), **rest)


def plan_study(
    request: TuneRequest,
    task: str,
    presets: Mapping[str, Settings],
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None,
    model: str,
) -> StudyPlan:
    """Settle what all trials share, and check all that can be checked before the first one.

    Args:
        request: What was asked for.
        task: TASK, or the program's class.
        presets: What to try first. The first is what all trials share, and what the winner is compared with.
        trainset: Examples to learn from.
        valset: Examples that a trial is scored on. None: a seeded fifth of `trainset`.
        model: The base model's name.

    Raises:
        UserError: the search space is wrong, or the budget is too small for one trial.
    """
    from fst_optimizer.data import split_data
    from fst_optimizer.run.record import digest

    first, *_ = presets.values()
    cap = planned_rollouts(first.config)
    base = with_cap(first, cap)
    check_space(request.space, base)
    if request.budget_rollouts is not None and request.budget_rollouts < cap:
        raise UserError(
            f"budget_rollouts is {request.budget_rollouts}, and one trial may take {cap}: give more, or cap trials "
            "lower by budget.max_rollouts"
        )
    train, val = split_data(trainset, valset, base.config.seed)
    return StudyPlan(
        task,
        base,
        request.space,
        request.objectives,
        cap,
        {"train": digest(train), "val": digest(val)},
        model,
        {name: with_cap(settings, cap) for name, settings in presets.items()},
    )


def plan_task_study(request: TuneRequest, choices: RunRequest) -> StudyPlan:
    """The same for a task, with settings as `fst compile` would take them."""
    if request.repeats and choices.url:
        raise UserError(
            f"repeats is {request.repeats} and --url is given: repeats start their own engines; leave one out"
        )
    task = plan_run(choices).task
    presets = presets_of(
        task.config() is not None, choices.auto, lambda auto: plan_run(replace(choices, auto=auto)).settings
    )
    train, val = task.load("train", choices.sizes.train), task.load("val", choices.sizes.val)
    return plan_study(request, choices.task, presets, train, val, Path(choices.model or str(task.model())).name)


def presets_of(own: bool, auto: str | None, settings_of: Callable[[str | None], Settings]) -> dict[str, Settings]:
    """What to try first: what would run without a search, then the presets.

    Args:
        own: Whether the task, or the caller, has settings of its own.
        auto: The preset that was asked for.
        settings_of: From a preset's name, or None, the settings that a run would have.
    """
    first = "own settings" if own and auto is None else f"preset {auto or 'light'}"
    return {first: settings_of(auto), **{f"preset {name}": settings_of(name) for name in PRESETS}}


def with_cap(settings: Settings, cap: int) -> Settings:
    """Settings of which a run ends at this number of training rollouts."""
    config = settings.config.with_values({"budget.max_rollouts": cap, "budget.max_cycles": MANY_CYCLES})
    return replace(settings, config=config)


def join_study(request: TuneRequest, plan: StudyPlan) -> Study:
    """The study, made or found.

    Raises:
        UserError: the storage cannot be reached, or the study is for something else.
    """
    if request.storage is None:
        request.folder.mkdir(parents=True, exist_ok=True)
    study = open_study(open_storage(request.url, request.heartbeat_s), request.study, plan, request.folder)
    request.folder.mkdir(parents=True, exist_ok=True)
    return study
