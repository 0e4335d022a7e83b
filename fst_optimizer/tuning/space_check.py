"""Whether a search space is one that no run would refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.trial import FixedTrial

from fst_optimizer.config.overrides import Settings, check_names
from fst_optimizer.engines.vllm.installed import RANKS
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.tuning.space import Space, Values, all_values, suggest, with_values

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


def check_space(space: Space, base: Settings) -> None:
    """Refuse an unknown setting or field (with the nearest name), a wrong range, or a value that FST refuses."""
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
    for values in _corners(space, base):
        try:
            with_values(base, values)
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
    needed_settings = [*([spec["of"]] if "of" in spec else []), *spec.get("if", {})]
    for other in [*spec.get("also", ()), *needed_settings]:
        _check_setting(other)
    for other in needed_settings:
        if other in space and other not in above:
            raise UserError(f"space {name}: it depends on {other}, which comes after it: move {other} up")
    if "choices" in spec or "times" in spec:
        _check_choices(name, spec)
    else:
        _check_range(name, spec)
    if name == "lora.rank" and (spec["type"] != "choice" or not set(spec["choices"]) <= set(RANKS)):
        served = ", ".join(map(str, RANKS))
        raise UserError(f"space lora.rank: give a choice among the ranks that vLLM serves: {served}")


def _check_setting(name: str) -> None:
    check_names([name])
    if name.split(".")[0] not in TUNABLE or name in UNTOUCHED:
        raise UserError(
            f"space {name}: every trial of a study must have the same, or their scores could not be compared; set it "
            f"for all of them by --set {name}=VALUE"
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
    fits, what = (_whole, "whole numbers") if spec["type"] == "int" else (_finite, "numbers")
    if not fits(low) or not fits(high):
        raise UserError(f"space {name}: low is {low!r} and high is {high!r}: give {what}")
    if not low < high:
        wrong = "empty" if low == high else "reversed"
        raise UserError(f"space {name}: its range from {low!r} to {high!r} is {wrong}: give a low below high")
    if spec.get("log") and low <= 0:
        raise UserError(f"space {name}: low is {low!r} on a log scale: give a number above 0")
    if step is not None and (not fits(step) or step <= 0 or spec.get("log")):
        raise UserError(f"space {name}: step is {step!r}: give one above 0, and none on a log scale")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Corner(FixedTrial):
    """Takes the first of the values (place 0) or the last (-1) of every range and choice, but for those `given`."""

    def __init__(self, place: int, given: Mapping[str, Any]) -> None:
        super().__init__({})
        self.place = place
        self.given = given
        self.options: dict[str, Sequence[Any]] = {}
        """Parameter -> the values that are looked at."""

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        """An end of the range."""
        return float(self.suggest_categorical(name, (low, high)))

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        """An end of the range."""
        return int(self.suggest_categorical(name, (low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """A choice."""
        if not choices:
            raise UserError(f"space {name}: none of its choices divides the other setting: give 1 among them")
        self.options[name] = choices
        return self.given.get(name, choices[self.place])


def _corners(space: Space, base: Settings) -> Iterator[Values]:
    """Settings at the ends of all ranges, and at each single end and choice with the others at their first and last."""
    for place in (0, -1):
        corner = Corner(place, {})
        yield suggest(corner, space, base)
        for name, options in corner.options.items():
            for option in options:
                yield suggest(Corner(place, {name: option}), space, base)
