"""Means, standard deviations and intervals: what a few seeds say, and how sure it is. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

CONFIDENCE = 0.95


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, summed exactly."""
    return math.fsum(values) / len(values)


def std(values: Sequence[float], ddof: int = 1) -> float:
    """The standard deviation: of a sample by default (divided by n - 1), of all there is with `ddof` 0."""
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - ddof))


def standard_error(score: float, examples: int) -> float:
    """Of a mean of `examples` scores in [0, 1]: the binomial bound sqrt(s (1 - s) / n).

    No distribution on [0, 1] with this mean has a larger variance, so graded scores are at most this uncertain.
    """
    return math.sqrt(score * (1 - score) / examples)


def mean_ci(values: Iterable[float | None]) -> dict[str, Any] | None:
    """`mean`, `low`, `high` and `n` over the values that are not None: a two-sided Student-t interval.

    `low` and `high` are None for a single value; the whole is None for no values. It is written to JSON as it is.
    """
    known = [value for value in values if value is not None]
    n = len(known)
    if not n:
        return None
    center = mean(known)
    if n == 1:
        return {"mean": center, "low": None, "high": None, "n": 1}
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std(known) / math.sqrt(n)
    return {"mean": center, "low": center - half, "high": center + half, "n": n}
