"""The search space: data that users copy and edit, its checks, and a trial's settings drawn from it.

A space is an object of settings' names, each with where its values come from:

    {"type": "float", "low": 2e-4, "high": 1e-2, "log": true}      also "step"
    {"type": "int", "low": 2, "high": 12}                          also "log", "step"
    {"type": "choice", "choices": ["cispo", "grpo"]}
    {"type": "divisor", "of": "rollout.group_size", "choices": [1, 2, 4]}     those that divide the other setting
    {"type": "multiple", "of": "lora.rank", "times": [1, 2, 4]}               the other setting times one of these

Each may have `"if": {"train.loss": ["cispo"]}`, which leaves it out unless the other setting has one of these values, and
`"also": [names]`, further settings that get the same value. What `of` and `if` name stands above, or is no part of the
space. Divisors and multiples are valid by construction: no trial is spent on settings that a run would refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from fst_optimizer.engines.vllm_server import RANKS
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.run.files import read_json
from fst_optimizer.settings import Settings, check_names, flat, settled

Space = Mapping[str, Mapping[str, Any]]
"""Setting -> where its values come from."""
Values = dict[str, Any]
"""Setting -> value, as for `--set`."""

FIELDS = {
    "float": ({"low", "high"}, {"log", "step"}),
    "int": ({"low", "high"}, {"log", "step"}),
    "choice": ({"choices"}, set()),
    "divisor": ({"of", "choices"}, set()),
    "multiple": ({"of", "times"}, set()),
}
"""Type -> the fields that it must have, and those that it may have besides `if` and `also`."""
TUNABLE = ("method", "fast", "rollout", "train", "lora")
"""Settings, or sections of them, that may differ between trials. The others decide what a score means or costs."""
UNTOUCHED = ("rollout.num_threads", "rollout.timeout_s", "train.microbatch_tokens", "train.gradient_checkpointing")
"""Of these, those that decide how fast a trial is and not what it learns."""


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

    A factor is no value of the setting itself: `lora.alpha / lora.rank`. Where not every choice divides every value of the
    other setting, each set of choices is a parameter of its own: an Optuna parameter cannot change its choices.
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
    from dataclasses import asdict

    return {**flat(settings.config.to_dict()), **flat({"lora": asdict(settings.lora)})}


def with_values(base: Settings, values: Mapping[str, Any]) -> Settings:
    """A trial's settings: these values over the study's own.

    Raises:
        UserError: they do not fit each other.
    """
    lora = {name: value for name, value in all_values(base).items() if name.startswith("lora.")}
    made = settled(base.config, lora, values)
    return Settings(made.config, made.lora, base.policy, base.vllm)


# -- checks -----------------------------------------------------------------------------------------------------


def check_space(space: Space, base: Settings) -> None:
    """A space that no run would refuse.

    Raises:
        UserError: an unknown setting or field (with the nearest name), an empty or reversed range, or a value that FST
            refuses.
    """
    if not space:
        raise UserError("the search space is empty: give at least one setting")
    settings: list[str] = []
    known = all_values(base)
    for name, spec in space.items():
        _check_entry(name, spec, space, settings)
        if "of" in spec and not _whole(known[spec["of"]]):
            raise UserError(f"space {name}: of is {spec['of']!r}: name a setting with a whole number")
        settings += [name, *spec.get("also", ())]
    twice = [name for name in settings if settings.count(name) > 1]
    if twice:
        raise UserError(f"the search space sets {twice[0]!r} twice: leave one of them out")
    for picked in _corners(space, base):
        try:
            with_values(base, picked.values)
        except UserError as error:
            raise UserError(f"the search space reaches settings that FST refuses: {error}") from error


def _check_entry(name: str, spec: object, space: Space, above: Sequence[str]) -> None:
    _check_setting(name)
    if not isinstance(spec, Mapping) or spec.get("type") not in FIELDS:
        kind = spec.get("type") if isinstance(spec, Mapping) else spec
        raise UserError(f"space {name}: its type is {kind!r}: {did_you_mean(str(kind), FIELDS)}")
    needed, optional = FIELDS[spec["type"]]
    fields = {*needed, *optional, "if", "also", "type"}
    for field in spec:
        if field not in fields:
            raise UserError(f"space {name}: unknown field {field!r}; {did_you_mean(field, fields)}")
    lacking = sorted(needed - set(spec))
    if lacking:
        raise UserError(f"space {name}: a {spec['type']} needs {', '.join(lacking)}")
    for other in spec.get("also", ()):
        _check_setting(other)
    for other in [*([spec["of"]] if "of" in spec else []), *spec.get("if", {})]:
        _check_setting(other)
        if other in space and other not in above:
            raise UserError(f"space {name}: it depends on {other}, which comes after it: move {other} up")
    if "choices" in spec or "times" in spec:
        _check_choices(name, spec)
    else:
        _check_range(name, spec)
    if name == "lora.rank":
        _check_ranks(spec)


def _check_setting(name: str) -> None:
    check_names([name])
    if name.split(".")[0] not in TUNABLE or name in UNTOUCHED:
        raise UserError(
            f"space {name}: every trial of a study must have the same, or their scores could not be compared; set it for "
            f"all of them by --set {name}=VALUE"
        )


def _check_choices(name: str, spec: Mapping[str, Any]) -> None:
    field = "times" if spec["type"] == "multiple" else "choices"
    choices = spec[field]
    if not isinstance(choices, list | tuple) or not choices:
        raise UserError(f"space {name}: {field} is {choices!r}: give a list of at least one value")
    plain = all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
    if not plain or len(set(map(repr, choices))) < len(choices):
        raise UserError(f"space {name}: {field} is {choices!r}: give numbers, words, true, false or null, each once")
    if spec["type"] in ("divisor", "multiple") and not all(_whole(choice) and choice > 0 for choice in choices):
        raise UserError(f"space {name}: {field} is {choices!r}: give whole numbers above 0")


def _check_range(name: str, spec: Mapping[str, Any]) -> None:
    low, high, step = spec["low"], spec["high"], spec.get("step")
    fits = _whole if spec["type"] == "int" else _finite
    if not fits(low) or not fits(high):
        what = "whole numbers" if spec["type"] == "int" else "numbers"
        raise UserError(f"space {name}: low is {low!r} and high is {high!r}: give {what}")
    if not low < high:
        what = "empty" if low == high else "reversed"
        raise UserError(f"space {name}: its range from {low!r} to {high!r} is {what}: give a low below high")
    if spec.get("log") and low <= 0:
        raise UserError(f"space {name}: low is {low!r} on a log scale: give a number above 0")
    if step is not None and (not fits(step) or step <= 0 or spec.get("log")):
        raise UserError(f"space {name}: step is {step!r}: give one above 0, and none on a log scale")


def _check_ranks(spec: Mapping[str, Any]) -> None:
    if spec["type"] != "choice" or not set(spec["choices"]) <= set(RANKS):
        served = ", ".join(map(str, RANKS))
        raise UserError(f"space lora.rank: give a choice among the ranks that vLLM serves: {served}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Picked:
    """Draws the value at one place of every range: 0 is the first, -1 the last; `name` alone may be at another."""

    def __init__(self, place: int, name: str = "", other: int = 0) -> None:
        self.place = place
        self.name = name
        self.other = other
        self.counts: dict[str, int] = {}
        """Parameter -> how many places it has."""
        self.values: Values = {}

    def _at(self, name: str, options: Sequence[Any]) -> Any:
        self.counts[name] = len(options)
        return options[self.other if name == self.name else self.place]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """An end of the range."""
        return float(self._at(name, (low, high)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """An end of the range."""
        return int(self._at(name, (low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """A choice."""
        if not choices:
            raise UserError(f"space {name}: none of its choices divides the other setting: give 1 among them")
        return self._at(name, choices)


def _corners(space: Space, base: Settings) -> Iterator[Picked]:
    """Settings at the ends of all ranges, and at each single end and choice with the others at their first and last."""
    for place in (0, -1):
        alone = _picked(space, base, lambda place=place: Picked(place))  # type: ignore[misc]
        yield alone
        for name, count in alone.counts.items():
            for other in range(count):
                yield _picked(space, base, lambda n=name, o=other, p=place: Picked(p, n, o))  # type: ignore[misc]


def _picked(space: Space, base: Settings, make: Callable[[], Picked]) -> Picked:
    picked = make()
    picked.values = suggest(picked, space, base)
    return picked


def largest_rank(space: Space, base: Settings) -> int:
    """The largest LoRA rank that a trial may have: what an engine is started for."""
    spec = space.get("lora.rank")
    return base.lora.rank if spec is None else max(spec["choices"])
