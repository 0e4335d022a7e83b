"""What a study is asked for, looked up and checked: nothing here spends a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from fst_optimizer.config.overrides import Settings
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.config.section import Remedy, Section
from fst_optimizer.errors import UserError
from fst_optimizer.task_run import RunRequest, plan_run, reflection_lm_of, reflection_name
from fst_optimizer.tuning.admission import Limits
from fst_optimizer.tuning.objectives import parse_objectives
from fst_optimizer.tuning.pruning import check_pruner
from fst_optimizer.tuning.samplers import check_sampler
from fst_optimizer.tuning.space import Space, default_space
from fst_optimizer.tuning.space_check import check_space
from fst_optimizer.tuning.storage import HEARTBEAT_S, open_storage
from fst_optimizer.tuning.study import StudyPlan, open_study, study_name

if TYPE_CHECKING:
    import dspy
    from optuna import Study

PRESETS = ("light", "medium", "heavy")
MANY_CYCLES = 100_000
"""The cap of rollouts ends a trial, not a number of cycles."""


class TuneRequest(Section):
    """What `fst tune` or `fst_optimizer.tune` was asked for, but for the program and its settings."""

    trials: int = Field(ge=1)
    """Finished trials, complete or pruned, that the study shall have in total."""
    study: str
    """Its name."""
    folder: Annotated[Path, Field(strict=False)]
    """Where everything goes."""
    storage: str | None = None
    """A database's URL. None: SQLite in the folder."""
    workers: int = Field(default=1, ge=1)
    """Processes that `fst tune` starts here."""
    sampler: str = "tpe"
    """`tpe`, `random`, `qmc`, `gp`, `cmaes`, `nsgaii`, `nsgaiii` or `brute_force`."""
    pruner: str = "hyperband"
    """`hyperband`, `median`, `wilcoxon` or `none`."""
    objectives: Annotated[tuple[str, ...], BeforeValidator(parse_objectives)] = ("score",)
    """`score`, or score and some of `rollouts`, `dollars`, `seconds`, `kl_to_base`: then nothing is pruned."""
    budget_rollouts: Annotated[int | None, Remedy("give a whole number of at least 1, or leave it out")] = Field(
        default=None, ge=1
    )
    """Most training rollouts of all trials together. None: no cap."""
    repeats: int = Field(default=0, ge=0)
    """More seeds for the leading configurations, and for the winner beside the preset on the test set."""
    space: Annotated[Mapping[str, Any], Remedy("give an object of settings")] = Field(default_factory=default_space)
    """Where settings come from, see `fst_optimizer.tuning.space`."""
    heartbeat_s: int = Field(default=HEARTBEAT_S, ge=1)
    """Seconds between two signs of life in the storage."""

    @model_validator(mode="after")
    def _has_known_algorithms(self) -> Self:
        check_sampler(self.sampler, len(self.objectives))
        check_pruner(self.pruner)
        return self

    @property
    def url(self) -> str:
        """The storage's."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    def limits(self, plan: StudyPlan) -> Limits:
        """When the study has enough."""
        return Limits(self.trials, plan.cap, self.budget_rollouts)


def make_request(
    task: str,
    seed: int,
    study: str | None,
    folder: str | Path | None,
    space: Space | None,
    options: Mapping[str, Any],
) -> TuneRequest:
    """By default the study is named after task and seed, its folder after the study; `options` are more fields."""
    name = study or study_name(task, seed)
    space = default_space() if space is None else space
    return TuneRequest(study=name, folder=Path(folder or f"runs/tune-{name}"), space=space, **options)


def plan_study(
    request: TuneRequest,
    task: str,
    presets: Mapping[str, Settings],
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None,
    model: str,
    reflection_lm: str | None = None,
) -> StudyPlan:
    """Settle what all trials share, and check all that can be checked before the first one.

    The first of `presets` is what all trials share, and what the winner is compared with.

    Raises:
        UserError: the search space is wrong, or the budget is too small for one trial.
    """
    from fst_optimizer.data import split_data
    from fst_optimizer.run.record import digest

    cap = planned_rollouts(next(iter(presets.values())).config)
    capped = {name: with_cap(settings, cap) for name, settings in presets.items()}
    base = next(iter(capped.values()))
    check_space(request.space, base)
    if request.budget_rollouts is not None and request.budget_rollouts < cap:
        raise UserError(
            f"budget_rollouts is {request.budget_rollouts}, and one trial may take {cap}: give more, or cap trials "
            "lower by budget.max_rollouts"
        )
    train, val = split_data(trainset, valset, base.config.seed)
    data = {"train": digest(train), "val": digest(val)}
    return StudyPlan(task, base, request.space, request.objectives, cap, data, model, reflection_lm, capped)


def planned_rollouts(config: FSTConfig) -> int:
    """Most training rollouts, fast and slow, that a run with these settings spends: what `budget.max_rollouts` caps."""
    if config.budget.max_rollouts is not None:
        return config.budget.max_rollouts
    cycles = config.budget.max_cycles
    fast = cycles * config.fast.max_rollouts if config.search_rollouts is None else config.search_rollouts
    slow = config.train.steps_per_cycle * config.rollout.batch_size * config.rollout.group_size
    return fast + cycles * slow * (config.method != "gepa")


def plan_task_study(request: TuneRequest, choices: RunRequest) -> StudyPlan:
    """The same for a task, with settings as `fst compile` would take them."""
    if request.repeats and choices.url:
        raise UserError(
            f"repeats is {request.repeats} and --url is given: repeats start their own engines; leave one out"
        )
    run_plan = plan_run(choices)
    task = run_plan.task
    reflection_lm_of(choices, run_plan)
    presets = presets_of(
        task.config() is not None, choices.auto, lambda auto: plan_run(replace(choices, auto=auto)).settings
    )
    train, val = task.load("train", choices.sizes.train), task.load("val", choices.sizes.val)
    model, reflection_lm = Path(choices.model or str(task.model())).name, reflection_name(choices, run_plan)
    return plan_study(request, choices.task, presets, train, val, model, reflection_lm)


def presets_of(own: bool, auto: str | None, settings_of: Callable[[str | None], Settings]) -> dict[str, Settings]:
    """What to try first: what would run without a search, then the presets.

    `own` says whether the task, or the caller, has settings of its own; `auto` is the preset that was asked for, and
    `settings_of` gives the settings that a run would have with a preset, or with None.
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
