"""Reads an output that a model wrote, and holds it against the right one. Pure functions.

Types are told apart as JSON and Python tell them: `1`, `1.0` and `True` are three different outputs, as are `"1"` and
`1`. A Python tuple reads as a list. The order of an object's keys does not matter.
"""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 4000
"""Of an answer that is read: the longest right one has 140."""
_FENCED = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """An answer that could be read."""

    value: Any


@dataclass(frozen=True)
class Difference:
    """Where two outputs first differ."""

    place: str
    """`[2]["a"]`, a path from the whole output; empty for the whole."""
    got: str
    """What is there, as JSON; empty where there is nothing."""
    expected: str
    of_type: bool
    """Whether the two are of different types."""


def parse(text: object) -> Parsed | None:
    """The value of a text that is JSON or a Python literal, alone or in the only code fence; None for any other."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        return None
    fenced = _FENCED.findall(text)
    for part in (text, *(fenced if len(fenced) == 1 else ())):
        for read in (_read_json, ast.literal_eval):
            try:
                return Parsed(_as_json_types(read(part.strip())))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    return None


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_number)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _as_json_types(value: Any) -> Any:
    """The value with tuples as lists. Raises ValueError for what JSON has no form of: sets, bytes, keys not strings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_as_json_types(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json_types(part) for key, part in value.items()}
    raise ValueError(f"JSON has no {type(value).__name__}")


def likeness(got: Any, expected: Any) -> float:
    """From 0 to 1: the share of elements, letters or entries that are the same, of all places or keys in either.

    Numbers are the same or not; the same number in another type (`1`, `1.0`, `true`) is half. Elements count by
    their own likeness: `[1, "ab"]` against `[1, "ax"]` is 0.75.
    """
    if isinstance(got, int | float) and isinstance(expected, int | float):
        return float(got == expected) * (1.0 if type(got) is type(expected) else 0.5)
    if type(got) is not type(expected):
        return 0.0
    if not isinstance(got, dict | list | str):
        return float(got == expected)
    theirs, right = _parts(got), _parts(expected)
    if not theirs and not right:
        return 1.0
    shared = [key for key in right if key in theirs]
    if isinstance(got, str):
        alike = float(sum(theirs[key] == right[key] for key in shared))
    else:
        alike = sum(likeness(theirs[key], right[key]) for key in shared)
    return alike / len({**theirs, **right})


def difference(got: Any, expected: Any, place: str = "") -> Difference | None:
    """The first place where two outputs differ, in the order of the expected one; None where they are the same."""
    if type(got) is not type(expected):
        return Difference(place, json.dumps(got), json.dumps(expected), True)
    if not isinstance(got, dict | list | str):
        return None if got == expected else Difference(place, json.dumps(got), json.dumps(expected), False)
    theirs, right = _parts(got), _parts(expected)
    for key in (*right, *(key for key in theirs if key not in right)):
        where = f"{place}[{json.dumps(key)}]"
        if key not in theirs or key not in right:
            one, other = (json.dumps(parts[key]) if key in parts else "" for parts in (theirs, right))
            return Difference(where, one, other, False)
        if isinstance(got, str):
            letters = json.dumps(theirs[key]), json.dumps(right[key])
            found = Difference(where, *letters, False) if theirs[key] != right[key] else None
        else:
            found = difference(theirs[key], right[key], where)
        if found:
            return found
    return None


def _parts(value: Any) -> dict[Any, Any]:
    """What a list, text or object consists of, by place or key."""
    return value if isinstance(value, dict) else dict(enumerate(value))
