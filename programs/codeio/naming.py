"""Which values a text names: how a trace that a model wrote is held against the values of the real run."""

import re
from collections.abc import Iterable

_INSIDE = re.compile(r"(?<=[\[({,:]) | (?=[\])},:])")
"""Spaces that only tell JSON from JSON, not those that part one value from the next."""
_WORDS = {"True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+)?(?!\w|\.[0-9])")


def plain(text: str) -> str:
    """One spelling for JSON and Python: `{'a': [1, 2]}` and `{"a":[1,2]}` are alike."""
    text = _INSIDE.sub("", " ".join(text.replace("'", '"').split()))
    return re.sub(r"\b(True|False|None)\b", lambda match: _WORDS[match[1]], text)


def names(text: str, value: str) -> bool:
    """Whether a text in plain spelling names a value, given as JSON. Strings count without their quotes too.

    `3` is not named by `13`, `-3`, `3.5` or `x3`; `[1, 2]` is not named by `1, 2`.
    """
    wanted = plain(value)
    if len(wanted) > 2 and wanted[0] == wanted[-1] == '"':
        wanted = wanted[1:-1]
    return re.search(rf"(?<![\w.-]){re.escape(wanted)}(?!\w|\.[0-9])", text) is not None


def new_values(noted: Iterable[str], shown: str) -> tuple[str, ...]:
    """The different values among the noted, without those that the prompt shows and strings of less than two letters.

    What can be copied from the prompt proves no trace, and a single letter is also an article.
    """
    text = plain(shown)
    long = [value for value in dict.fromkeys(noted) if value[0] != '"' or len(value) > len('"a"')]
    return tuple(value for value in long if not names(text, value))


def numbers_in(text: str) -> frozenset[str]:
    """The numbers that stand in a text by themselves: `x1 = 13, -2.5` has 13 and -2.5."""
    return frozenset(_NUMBER.findall(text))


def followed(steps: str, states: Iterable[str], shown: str) -> tuple[float, tuple[str, ...], bool]:
    """How well a trace names the values of the run: its score, the values that it lacks, and whether it strays.

    The score is the share of values named. A trace strays when less than half of its different numbers occur in
    prompt or values, as one that lists all numbers does: its score then shrinks in proportion. Partial results and
    numbered steps are so allowed for.
    """
    states, text = tuple(states), plain(steps)
    missing = tuple(value for value in states if not names(text, value))
    share = 1 - len(missing) / len(states) if states else 1.0
    written, known = numbers_in(text), numbers_in(plain(f"{shown} {' '.join(states)}"))
    trust = min(1.0, 2 * len(written & known) / len(written)) if written else 1.0
    return share * trust, missing, trust < 1.0
