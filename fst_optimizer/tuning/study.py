"""The study: where it is stored, what it was made for, and whether it is the one that is meant."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import migrated
from fst_optimizer.config.overrides import Settings, flat
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.tuning.objectives import DIRECTIONS
from fst_optimizer.tuning.space import Space, parameters_of, suggest, with_values
from fst_optimizer.tuning.storage import quiet_optuna

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

logger = logging.getLogger(__name__)

ABOUT = "fst"
"""The user attribute of a study that says what it was made for."""
SETTLING_S = 20.0
"""How long a study that another process has just created may take to say what it is for."""


@dataclass(frozen=True)
class Plan:
    """What a study is made for. Whoever goes on with it must mean the same."""

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
    """Its name, without its place."""

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
        }


def settings_json(settings: Settings) -> dict[str, Any]:
    """Settings as `fst compile --config` takes them."""
    return {
        "config": settings.config.to_dict(),
        "policy": {"lora": settings.lora.to_dict(), **settings.policy.to_dict()},
    }


def settings_from_json(data: Mapping[str, Any]) -> Settings:
    """The inverse of `settings_json`."""
    policy = dict(data["policy"])
    lora = dict(policy.pop("lora"))
    return Settings(FSTConfig.from_dict(data["config"]), LoraConfig(**lora), PolicyConfig(**policy))


def open_study(
    storage: BaseStorage, name: str, plan: Plan, presets: Mapping[str, Settings], seed_attrs: Mapping[str, Any] = {}
) -> tuple[Study, bool]:
    """The study of that name, and whether it is new. A new one has the presets' settings enqueued.

    Args:
        storage: Where.
        name: Its name.
        plan: What it is for.
        presets: Name -> settings to try first, in order; those that are alike are tried once.
        seed_attrs: More user attributes of a new study.

    Raises:
        UserError: a study of that name has another space, other directions or other settings, or was not made here.
    """
    import optuna

    directions: list[Any] = [DIRECTIONS[objective] for objective in plan.objectives]
    with quiet_optuna():
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            check_same(study, plan)
            return study, False
        for key, value in seed_attrs.items():
            study.set_user_attr(key, value)
        for label, params in distinct_presets(presets, plan).items():
            study.enqueue_trial(params, user_attrs={"origin": label})
        study.set_user_attr(ABOUT, plan.to_json())  # last: whoever comes second waits for it
    return study, True


def distinct_presets(presets: Mapping[str, Settings], plan: Plan) -> dict[str, dict[str, Any]]:
    """Name -> parameters, each set of parameters once; what the space does not quite reach is called `like` it."""
    found: dict[str, dict[str, Any]] = {}
    for label, settings in presets.items():
        params = parameters_of(settings, plan.space)
        if params and params not in found.values():
            found[label if _gives(params, plan) == settings else f"like {label}"] = params
    return found


def _gives(params: Mapping[str, Any], plan: Plan) -> Settings | None:
    """The settings of a trial with these parameters. None: some are left to the sampler."""
    from optuna.trial import FixedTrial

    try:
        return with_values(plan.settings, suggest(FixedTrial(dict(params)), plan.space, plan.settings))
    except ValueError:
        return None


def check_same(study: Study, plan: Plan) -> None:
    """The study is for the same.

    Raises:
        UserError: it is not; names what differs.
    """
    name, directions = study.study_name, [direction.name.lower() for direction in study.directions]
    wanted = [DIRECTIONS[objective] for objective in plan.objectives]
    another = "give another --study, or ask for what it was made with"
    if directions != wanted:
        raise UserError(f"study {name!r} exists with the directions {directions}, not {wanted}: {another}")
    before = _about(study)
    if before is None:
        raise UserError(f"study {name!r} exists and was not made by fst tune: give another --study")
    now = plan.to_json()
    if before["space"] != now["space"]:
        odd = sorted(
            key for key in {**before["space"], **now["space"]} if before["space"].get(key) != now["space"].get(key)
        )
        raise UserError(f"study {name!r} exists with another search space ({', '.join(odd)}): {another}")
    old, new = (flat({key: value for key, value in one.items() if key != "space"}) for one in (before, now))
    odd = [f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if odd:
        raise UserError(f"study {name!r} exists with other settings ({'; '.join(odd)}): {another}")


def _about(study: Study) -> dict[str, Any] | None:
    deadline = time.monotonic() + (SETTLING_S if not study.get_trials(deepcopy=False) else 0)
    while True:
        about: dict[str, Any] | None = study.user_attrs.get(ABOUT)
        if about is not None or time.monotonic() > deadline:
            return about and {**about, "settings": migrated(about["settings"])}
        time.sleep(0.2)


def plan_of(study: Study) -> Plan:
    """What a study was made for, read back.

    Raises:
        UserError: it was not made by `fst tune`.
    """
    about = _about(study)
    if about is None:
        raise UserError(f"study {study.study_name!r} was not made by fst tune: give another --study")
    return Plan(
        about["task"],
        settings_from_json(about["settings"]),
        about["space"],
        tuple(about["objectives"]),
        about["cap"],
        about["data"],
        about["model"],
    )


def study_name(task: str, seed: int) -> str:
    """`programs/letters:sort-rotate` with seed 0 is `letters-sort-rotate-0`."""
    import re

    place, _, variant = task.partition(":")
    parts = [re.split(r"[/.]", place.rstrip("/"))[-1], variant, str(seed)]
    return re.sub(r"[^\w-]+", "-", "-".join(part for part in parts if part)).strip("-")


def check_folder(folder: Path, fresh: bool) -> None:
    """A new study's folder holds no trials of another.

    Raises:
        UserError: it does.
    """
    if fresh and any((folder / "trials").glob("trial-*")):
        raise UserError(f"{folder} holds the trials of another study: give another --dir, or that study's --storage")


def trial_folder(folder: Path, number: int) -> Path:
    """A trial's run directory."""
    return folder / "trials" / f"trial-{number:06d}"
