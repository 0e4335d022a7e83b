"""For writing a `task.py`: variants by name, splits by hash, examples with ids, and feedback by predictor.

The tasks in `programs/` use it; a task of one's own may. What it raises is a ValueError, which `load_task` turns into a
UserError that names the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import dspy

T = TypeVar("T")

QUARTERS = ("train", "train", "val", "test")
"""The split that each quarter of all problems belongs to; a problem's hash says which quarter it is in."""


def split_by_hash(text: str) -> str:
    """The split that a problem belongs to, decided by its text alone, so that none is in two splits."""
    return QUARTERS[hashlib.sha256(text.encode()).digest()[0] % 4]


def named(task: str, variants: Mapping[str, T], name: str) -> T:
    """The variant of that name; a ValueError where `task` has none."""
    if name not in variants:
        raise ValueError(f"unknown variant {name!r} of {task}; choose one of {', '.join(variants)}")
    return variants[name]


def checked_size(split: str, size: int | None, sizes: Mapping[str, int], largest: int) -> int:
    """How many examples to load: `size`, or the split's own of `sizes` where it is None, cut to `largest`.

    Raises:
        ValueError: There is no such split, or `size` is out of range.
    """
    if split not in sizes:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(sizes)}")
    if size is None:
        return min(sizes[split], largest)
    if not 0 <= size <= largest:
        raise ValueError(f"size must be between 0 and {largest}, not {size}")
    return size


def distinct(draws: Iterable[tuple[str | None, T]], count: int, patience: int | None = None) -> list[T]:
    """The first `count` values whose keys differ, in the order in which they come.

    The key None marks a value that does not belong, as one of another split. After `patience` draws in a row without a
    new value, fewer than `count` are returned. None: never.
    """
    found: dict[str, T] = {}
    wasted = 0
    for key, value in draws if count else ():
        if key is None or key in found:
            wasted += 1
        else:
            found[key] = value
            wasted = 0
        if len(found) == count or wasted == patience:
            break
    return list(found.values())


def numbered(split: str, seed: int, rows: Iterable[Mapping[str, Any]], *inputs: str) -> list[dspy.Example]:
    """An example a row, with an id that names split, seed and place, and these fields as inputs."""
    return [
        dspy.Example(id=f"{split}-{seed}-{place:04d}", **row).with_inputs(*inputs) for place, row in enumerate(rows)
    ]


def by_predictor(
    pred_name: str | None,
    predictors: Iterable[str],
    judge: Callable[[str], tuple[float, str]],
    score: float | None = None,
) -> dspy.Prediction:
    """What a metric returns: one predictor's score and feedback, or the program's score and all feedback.

    `pred_name` is the predictor that GEPA or credit by predictor asks about, None for the program; `predictors` are all
    that the program has, in order. `judge` gives a predictor's score and feedback. The program's score is `score`, or
    the mean of its predictors' scores where that is None. An unknown predictor raises a ValueError.
    """
    names = list(predictors)
    if pred_name is not None:
        if pred_name not in names:
            raise ValueError(f"the program has no predictor {pred_name!r}, only {', '.join(names)}")
        own, feedback = judge(pred_name)
        return dspy.Prediction(score=own, feedback=feedback)
    judged = {name: judge(name) for name in names}
    lines = [f"{name}: {text}" if len(names) > 1 else text for name, (_, text) in judged.items()]
    mean = sum(own for own, _ in judged.values()) / len(names)
    return dspy.Prediction(score=mean if score is None else score, feedback="\n".join(lines))
