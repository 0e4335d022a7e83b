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

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from optuna.trial import BaseTrial

from fst_optimizer.config.overrides import Settings, flat
from fst_optimizer.store.files import read_json

Space = Mapping[str, Mapping[str, Any]]
"""Setting -> where its values come from."""
Values = dict[str, Any]
"""Setting -> value, as for `--set`."""


def default_space() -> dict[str, Any]:
    """The space that is used unless another is given; `space.json` beside this module."""
    return read_json(Path(str(files(__package__).joinpath("space.json"))))


def suggest(trial: BaseTrial, space: Space, base: Settings) -> Values:
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
    if spec["type"] == "divisor" and (fitting := _choices(spec, known)) != list(spec["choices"]):
        return f"{name} of {', '.join(map(str, fitting))}"
    return name


def _drawn(trial: BaseTrial, name: str, spec: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    called, log = parameter(name, spec, known), bool(spec.get("log"))
    if spec["type"] == "float":
        return trial.suggest_float(called, spec["low"], spec["high"], step=spec.get("step"), log=log)
    if spec["type"] == "int":
        return trial.suggest_int(called, spec["low"], spec["high"], step=spec.get("step", 1), log=log)
    picked: Any = trial.suggest_categorical(called, _choices(spec, known))
    return known[spec["of"]] * picked if spec["type"] == "multiple" else picked


def _choices(spec: Mapping[str, Any], known: Mapping[str, Any]) -> list[Any]:
    if spec["type"] == "multiple":
        return list(spec["times"])
    return [choice for choice in spec["choices"] if spec["type"] == "choice" or known[spec["of"]] % choice == 0]


def parameters_of(settings: Settings, space: Space) -> dict[str, Any]:
    """The study's parameters that give these settings; without those that the space does not reach."""
    known = all_values(settings)
    found = {}
    for name, spec in space.items():
        if not applies(spec, known):
            continue
        value = known[name]
        if spec["type"] == "multiple":
            factor, rest = divmod(value, known[spec["of"]])
            value = None if rest else factor
        if spec["type"] in ("float", "int"):
            reached = spec["low"] <= value <= spec["high"]
        else:
            reached = value in _choices(spec, known)
        if reached:
            found[parameter(name, spec, known)] = value
    return found


def all_values(settings: Settings) -> dict[str, Any]:
    """Every setting under its dotted name, as the space names them."""
    return {**flat(settings.config.to_dict()), **flat({"lora": settings.lora.to_dict()})}


def with_values(base: Settings, values: Mapping[str, Any]) -> Settings:
    """A trial's settings: these values over those that all trials share.

    Raises:
        UserError: they do not fit each other.
    """
    config = {name: value for name, value in values.items() if not name.startswith("lora.")}
    lora = {name.removeprefix("lora."): value for name, value in values.items() if name not in config}
    return replace(base, config=base.config.with_values(config), lora=base.lora.changed(**lora))


def largest_rank(space: Space, base: Settings) -> int:
    """The largest LoRA rank that a trial may have: what an engine is started for."""
    return max(space["lora.rank"]["choices"]) if "lora.rank" in space else base.lora.rank
