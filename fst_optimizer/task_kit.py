"""For writing a `task.py`: variants by name or spelled, splits by hash, examples with ids, kinds of feedback.

The tasks in `programs/` use it; a task of one's own may. What it raises is a ValueError, which `load_task` turns into a
UserError that names the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import dspy

T = TypeVar("T")

KINDS = ("told", "shown", "scored", "shuffled")
"""What feedback says of the same answer with the same score: the rule in a sentence; only what was got and what was
right; nothing but the number; as `shown`, with the right answer of another example (a control)."""
MOST_STAGES, MOST_OPERATIONS = 3, 3
"""Of a rule that is spelled: predictors of its program, operations of a predictor."""

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


def split_kind(variant: str | None) -> tuple[str, str]:
    """`pipeline+shown` as rule and kind of feedback. No rule is "", for the task's default; no kind is `told`.

    Raises:
        ValueError: There is no such kind.
    """
    rule, plus, kind = (variant or "").partition("+")
    if plus and kind not in KINDS:
        raise ValueError(f"unknown kind of feedback {kind!r}; choose one of {', '.join(KINDS)}")
    return rule, kind or KINDS[0]


def spelled(task: str, rule: str, operations: Iterable[str], names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """`drop_first.sort-rotate` as `(("drop_first",), ("sort", "rotate"))`: a stage a predictor, in order.

    Raises:
        ValueError: An operation that `task` lacks, or too many. It tells these and the `names` that rules have.
    """
    stages = tuple(tuple(stage.split("-")) for stage in rule.split("."))
    known = list(operations)
    if not all(name in known for stage in stages for name in stage):
        raise ValueError(
            f"unknown variant {rule!r} of {task}; choose one of {', '.join(names)}, or spell a rule, its stages joined "
            f"by '.' and the operations of a stage by '-', out of {', '.join(known)}"
        )
    if len(stages) > MOST_STAGES or max(map(len, stages)) > MOST_OPERATIONS:
        raise ValueError(
            f"rule {rule!r} of {task} is too long; spell one to {MOST_STAGES} stages, each of one to {MOST_OPERATIONS} "
            "operations"
        )
    return stages


def feedback(
    kind: str, score: float, answer: object, target: str, told: str, other: Callable[[], str], given: str = ""
) -> str:
    """What a predictor is told of its answer, by the kind of feedback.

    Args:
        kind: One of `KINDS`.
        score: The answer's, 1 for a right one.
        answer: What was got; anything but text is no answer.
        target: What was right.
        told: The sentence that names the rule, added where the kind is `told`.
        other: Gives another example's right answer, never this one's. Only `shuffled` asks, and it shows that even for
            a right answer: else it would say what is right.
        given: What the predictor was given, where the feedback is to repeat it: a small reflection model relates more
            easily what stands side by side (docs/decisions.md).
    """
    if kind == "scored":
        return f"Score {score:.2f}."
    if kind != "shuffled" and score == 1.0:
        return f'Right: "{given}" gives "{target}".' if given else "Right."
    got = f'Got "{answer}"' if isinstance(answer, str) else "Got no answer"
    right = f'"{other() if kind == "shuffled" else target}"'
    shown = f'{got}, but "{given}" gives {right}.' if given else f"{got}, expected {right}."
    return f"{shown} {told}" if kind == "told" else shown


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
