"""What all settings have in common: frozen, checked once when they are made, and refused in words that help.

A section is a pydantic model. Its types are strict: "8" and True are no numbers, and no number may be NaN or infinite.
This is the one place that turns pydantic's errors into a `UserError` with field, value and remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from fst_optimizer.config.formats import ELSEWHERE, RENAMED
from fst_optimizer.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Remedy:
    """In `Annotated`: what to give instead of a value that does not fit, where the type alone does not say it."""

    text: str


class Section(BaseModel):
    """Settings that belong together.

    Raises:
        UserError: an unknown name (with the nearest one), or a value that does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    section: ClassVar[str] = ""
    """Where its settings are: `train` for `train.lr`. Empty for those at the top."""

    def __init_subclass__(cls, *, section: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.section = section

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), values, error) from None
        except TypeError:  # where a section in this one is called with names that are no strings
            for name, value in values.items():
                if isinstance(value, Mapping) and not has_names(value):
                    raise UserError(f"config: {name} is {value!r}: give an object of settings") from None
            raise

    def changed(self, /, **values: Any) -> Self:
        """A copy with other values, checked like a new one."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written in `config.json`."""
        return self.model_dump(mode="json")

    def given(self) -> dict[str, Any]:
        """Those settings that were given when it was made, be it with the value that is the default, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)


def has_names(values: Mapping[Any, Any]) -> bool:
    """Whether all keys are strings."""
    return all(isinstance(key, str) for key in values)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings over others: an object is laid over an object, anything else takes the place of what was."""
    nested = {
        name: merged(old[name], value)
        for name, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(name), Mapping)
    }
    return {**old, **new, **nested}


def _refusal(model: type[Section], values: Mapping[str, Any], error: ValidationError) -> UserError:
    """The first thing that pydantic found, with field, value and remedy."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of a section in this one, or of a rule that reads more than one field
        return cause
    path = [part for part in first["loc"] if isinstance(part, str) and part != "[key]"]  # without places in lists
    name = ".".join([model.section, *path] if model.section else path)
    if first["type"] == "extra_forbidden":
        ours = ELSEWHERE.get(path[0])
        remedy = f"did you mean {ours!r}?" if ours else did_you_mean(RENAMED.get(path[0], path[0]), model.model_fields)
        return UserError(f"config: unknown key {name!r}; {remedy}")
    value: Any = values
    for part in path:
        value = value[part]
    if first["type"] == "model_type":
        return UserError(f"config: {name} is {value!r}: give an object of settings")
    return UserError(f"{name} is {value!r}: {_remedy(model.model_fields[path[0]], path[1:], value)}")


def _remedy(field: FieldInfo, below: list[str], value: object) -> str:
    """What a field takes, read off its declaration; `below` leads to an entry of a field that is an object."""
    kind: Any = field.annotation
    notes: list[Any] = field.metadata
    for _ in below:
        kind = get_args(kind)[1]
        notes = list(getattr(kind, "__metadata__", ()))
        kind = getattr(kind, "__origin__", kind) if notes else kind
    if said := [note.text for note in notes if isinstance(note, Remedy)]:
        return said[0]
    if get_origin(kind) is Literal:
        return did_you_mean(str(value), get_args(kind))
    kinds = {kind, *get_args(kind)}
    if bool in kinds:
        return "give true or false"
    if str in kinds:
        return "give a string"
    bounds = [
        f"{words} {getattr(note, name)}"
        for name, words in (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        for note in notes
        if hasattr(note, name)
    ]
    return " ".join(["give a whole number" if int in kinds else "give a number", " and ".join(bounds)]).strip()
