"""The search space: data that users copy and edit, its checks, and a trial's settings drawn from it.

A space is an object of settings' names, each with where its values come from:

    {"type": "float", "low": 2e-4, "high": 1e-2, "log": true}      also "step"
    {"type": "int", "low": 2, "high": 12}                          also "log", "step"
    {"type": "choice", "choices": ["cispo", "grpo"]}
    {"type": "divisor", "of": "rollout.group_size", "choices": [1, 2, 4]}     those that divide the other setting
    {"type": "multiple", "of": "lora.rank", "times": [1, 2, 4]}               the other setting times one of these

Each may have `"if": {"train.loss": ["cispo"]}`, which leaves it out unless the other setting has one of these values,
and `"also": [names]`, further settings that get the same value. What `of` and `if` name stands above, or is no part of
the space. Divisors and multiples are valid by construction: no trial is spent on settings that a run would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from fst_optimizer.config.overrides import Settings, flat, settled
from fst_optimizer.store.files import read_json

Space = Mapping[str, Mapping[str, Any]]
"""Setting -> where its values come from."""
Values = dict[str, Any]
"""Setting -> value, as for `--set`."""


class Suggest(Protocol):
    """The part of `optuna.Trial` that draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """A number from a range."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A whole number from a range."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of a few."""
        ...


def default_space() -> dict[str, Any]:
    """The space that is used unless another is given; `space.json` beside this module."""
    return read_json(Path(str(files(__package__).joinpath("space.json"))))


def read_space(path: Path) -> dict[str, Any]:
    """A space from a JSON file.

    Raises:
        UserError: the file is missing or is no JSON object.
    """
    return read_json(path)


# -- drawing ----------------------------------------------------------------------------------------------------


def suggest(trial: Suggest, space: Space, base: Settings) -> Values:
    """One trial's settings. Parameters of the study are called as in `parameter`."""
    given = all_values(base)
    values: Values = {}
    for name, spec in space.items():
        known = {**given, **values}
        if not applies(spec, known):
            continue
        values[name] = _drawn(trial, name, spec, known)
        values.update(dict.fromkeys(spec.get("also", ()), values[name]))
    return values


def applies(spec: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a setting with an `if` is drawn, given the other settings."""
    return all(known[other] in wanted for other, wanted in spec.get("if", {}).items())


def parameter(name: str, spec: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What a setting is called in the study.

    A factor is no value of the setting itself: `lora.alpha / lora.rank`. Where not every choice divides every value of
    the other setting, each set of choices is a parameter of its own: an Optuna parameter cannot change its choices.
    """
    if spec["type"] == "multiple":
        return f"{name} / {spec['of']}"
    if spec["type"] == "divisor" and (fitting := _fitting(spec, known)) != list(spec["choices"]):
        return f"{name} of {', '.join(map(str, fitting))}"
    return name


def _drawn(trial: Suggest, name: str, spec: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    called, log = parameter(name, spec, known), bool(spec.get("log"))
    match spec["type"]:
        case "float":
            return trial.suggest_float(called, spec["low"], spec["high"], step=spec.get("step"), log=log)
        case "int":
            return trial.suggest_int(called, spec["low"], spec["high"], step=spec.get("step", 1), log=log)
        case "divisor":
            return trial.suggest_categorical(called, _fitting(spec, known))
        case "multiple":
            return known[spec["of"]] * trial.suggest_categorical(called, list(spec["times"]))
        case _:
            return trial.suggest_categorical(called, list(spec["choices"]))


def _fitting(spec: Mapping[str, Any], known: Mapping[str, Any]) -> list[int]:
    return [choice for choice in spec["choices"] if known[spec["of"]] % choice == 0]


def parameters_of(settings: Settings, space: Space) -> dict[str, Any]:
    """The study's parameters that give these settings; without those that the space does not reach."""
    known = all_values(settings)
    found = {}
    for name, spec in space.items():
        if not applies(spec, known):
            continue
        value = known[name]
        if spec["type"] == "multiple":
            value = next((times for times in spec["times"] if times * known[spec["of"]] == value), None)
            reached = value is not None
        elif spec["type"] in ("float", "int"):
            reached = spec["low"] <= value <= spec["high"]
        else:
            reached = value in (_fitting(spec, known) if spec["type"] == "divisor" else spec["choices"])
        if reached:
            found[parameter(name, spec, known)] = value
    return found


def all_values(settings: Settings) -> dict[str, Any]:
    """Every setting under its dotted name, as the space names them."""
    return {**flat(settings.config.to_dict()), **flat({"lora": settings.lora.to_dict()})}


def with_values(base: Settings, values: Mapping[str, Any]) -> Settings:
    """A trial's settings: these values over the study's own.

    Raises:
        UserError: they do not fit each other.
    """
    lora = {name: value for name, value in all_values(base).items() if name.startswith("lora.")}
    made = settled(base.config, lora, values)
    return Settings(made.config, made.lora, base.policy, base.vllm)


def largest_rank(space: Space, base: Settings) -> int:
    """The largest LoRA rank that a trial may have: what an engine is started for."""
    spec = space.get("lora.rank")
    return base.lora.rank if spec is None else max(spec["choices"])
