"""Compares answers with math-verify. Runs in the helper process of `fst_optimizer.sandbox`.

The time limits of math-verify need the main thread and cannot stop a single long computation, so they are off here:
the sandbox ends the whole process instead.
"""

import logging
from typing import Any

from math_verify import parse, verify  # type: ignore[import-untyped, unused-ignore]

logging.disable(logging.WARNING)

NEAR = 0.01
"""Relative distance up to which a wrong number is called near."""


def judge(expected: str, answer: str) -> dict[str, bool]:
    """Whether an answer has the expected value.

    Args:
        expected: The right answer, in LaTeX or plain.
        answer: Any text; what is in a box counts, or else all of it, or else the last expression in it.

    Returns:
        `equal`; `parsed`: there is an expression in the answer; `near`: it is another number close by.
    """
    golds = _parsed(boxed(expected))
    readings = [_parsed(answer)] if "\\boxed" in answer else [_parsed(boxed(answer)), _parsed(answer)]
    return {
        "equal": _bare(expected) == _bare(answer) != "" or any(_equal(golds, reading) for reading in readings),
        "parsed": any(_expressions(reading) for reading in readings),
        "near": any(_near(golds, reading) for reading in readings),
    }


def boxed(text: str) -> str:
    """The text as the content of a box, unless it has one."""
    return text if "\\boxed" in text else f"\\boxed{{{text.strip().strip('$')}}}"


def _bare(text: str) -> str:
    text = text.strip().strip("$").strip()
    if text.startswith("\\boxed{") and text.endswith("}"):
        text = text[len("\\boxed{") : -1]
    return "".join(text.split())


def _parsed(text: str) -> list[Any]:
    return list(parse(text, parsing_timeout=None))


def _equal(golds: list[Any], reading: list[Any]) -> bool:
    return bool(verify(golds, reading, timeout_seconds=None))


def _expressions(reading: list[Any]) -> list[Any]:
    """What was understood; math-verify adds the text itself."""
    return [value for value in reading if not isinstance(value, str)]


def _near(golds: list[Any], reading: list[Any]) -> bool:
    try:
        pairs = [(float(gold), float(got)) for gold in _expressions(golds) for got in _expressions(reading)]
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False
    return any(0 < abs(gold - got) <= NEAR * abs(gold) for gold, got in pairs)
