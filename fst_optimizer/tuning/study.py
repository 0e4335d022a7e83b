"""The study: what it is for, and whether one that exists is for the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial

from fst_optimizer.config.formats import migrated
from fst_optimizer.config.overrides import Settings, flat
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.tasks import run_name
from fst_optimizer.tuning.objectives import DIRECTIONS
from fst_optimizer.tuning.space import Space, parameters_of, suggest, with_values
from fst_optimizer.tuning.storage import quiet_optuna

ABOUT = "fst"
"""The user attribute of a study that holds its plan."""
SETTLING_S = 20.0
"""How long a study that another process has just created may take to get its plan."""


@dataclass(frozen=True)
class StudyPlan:
    """What a study is for. All who work on it must mean the same."""

    task: str
    settings: Settings
    """What all trials share."""
    space: Space
    objectives: tuple[str, ...]
    cap: int
    """Training rollouts of one trial."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Sizes and hashes of the splits."""
    model: str = ""
    """Its name, without its folder."""
    reflection_lm: str | None = None
    """Its name."""
    presets: Mapping[str, Settings] = field(default_factory=dict)
    """What to try first. The winner is compared with the first of them. The study does not keep them."""

    def to_json(self) -> dict[str, Any]:
        """As the study keeps it."""
        return {
            "task": self.task,
            "settings": settings_json(self.settings),
            "space": {name: dict(spec) for name, spec in self.space.items()},
            "objectives": list(self.objectives),
            "cap": self.cap,
            "data": dict(self.data),
            "model": self.model,
            "reflection_lm": self.reflection_lm,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudyPlan:
        """The inverse of `to_json`."""
        settings = settings_from_json(data["settings"])
        return cls(**{**data, "settings": settings, "objectives": tuple(data["objectives"])})

    def settings_of(self, params: Mapping[str, Any]) -> Settings:
        """The settings of a trial with these parameters.

        Raises:
            ValueError: some parameters are missing.
        """
        return with_values(self.settings, suggest(FixedTrial(dict(params)), self.space, self.settings))


def settings_json(settings: Settings) -> dict[str, Any]:
    """Settings as `fst compile --config` takes them."""
    policy = {"lora": settings.lora.to_dict(), **settings.policy.to_dict()}
    return {"config": settings.config.to_dict(), "policy": policy}


def settings_from_json(data: Mapping[str, Any]) -> Settings:
    """The inverse of `settings_json`."""
    policy = dict(data["policy"])
    lora = LoraConfig(**policy.pop("lora"))
    return Settings(FSTConfig.from_dict(data["config"]), lora, PolicyConfig(**policy))


def open_study(storage: optuna.storages.BaseStorage, name: str, plan: StudyPlan, folder: Path) -> optuna.Study:
    """The study of that name. A new one has the presets' settings enqueued.

    Raises:
        UserError: a study of that name has another space, other directions or other settings, or was not made here; or
            the study is new, and its folder has the trials of another.
    """
    directions: list[Any] = [DIRECTIONS[objective] for objective in plan.objectives]
    with quiet_optuna():
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            check_same(study, plan)
            return study
        for label, params in distinct_presets(plan).items():
            study.enqueue_trial(params, user_attrs={"origin": label})
        study.set_user_attr(ABOUT, plan.to_json())  # last: whoever comes second waits for it
    if any((folder / "trials").glob("trial-*")):
        raise UserError(f"{folder} holds the trials of another study: give another --dir, or that study's --storage")
    return study


def distinct_presets(plan: StudyPlan) -> dict[str, dict[str, Any]]:
    """Name -> parameters, each set of parameters once; where the space lacks a preset's settings it is `like` it."""
    found: dict[str, dict[str, Any]] = {}
    for label, settings in plan.presets.items():
        params = parameters_of(settings, plan.space)
        if not params or params in found.values():
            continue
        try:
            same = plan.settings_of(params) == settings
        except ValueError:  # some parameters are left to the sampler
            same = False
        found[label if same else f"like {label}"] = params
    return found


def check_same(study: optuna.Study, plan: StudyPlan) -> None:
    """Refuse a study that is for something else; the error names what differs."""
    name, directions = study.study_name, [direction.name.lower() for direction in study.directions]
    wanted = [DIRECTIONS[objective] for objective in plan.objectives]
    remedy = "give another --study, or ask for what it was made with"
    if directions != wanted:
        raise UserError(f"study {name!r} exists with the directions {directions}, not {wanted}: {remedy}")
    old, new = _about(study), plan.to_json()
    if odd := _differing(old.pop("space"), new.pop("space")):
        raise UserError(f"study {name!r} exists with another search space ({', '.join(sorted(odd))}): {remedy}")
    old, new = flat({"reflection_lm": new["reflection_lm"], **old}), flat(new)  # an older study does not say
    if odd := [f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in _differing(old, new)]:
        raise UserError(f"study {name!r} exists with other settings ({'; '.join(odd)}): {remedy}")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def plan_of(study: optuna.Study) -> StudyPlan:
    """What a study is for, read back."""
    return StudyPlan.from_json(_about(study))


def _about(study: optuna.Study) -> dict[str, Any]:
    deadline = time.monotonic() + (0 if study.get_trials(deepcopy=False) else SETTLING_S)
    while True:
        about: dict[str, Any] | None = study.user_attrs.get(ABOUT)
        if about is not None:
            return {**about, "settings": migrated(about["settings"])}
        if time.monotonic() > deadline:
            raise UserError(f"study {study.study_name!r} exists and was not made by fst tune: give another --study")
        time.sleep(0.2)


def study_name(task: str, seed: int) -> str:
    """`programs/letters:sort-rotate` with seed 0 is `letters-sort-rotate-0`."""
    return f"{run_name(task)}-{seed}"


def trial_folder(folder: Path, number: int) -> Path:
    """A trial's run directory."""
    return folder / "trials" / f"trial-{number:06d}"
