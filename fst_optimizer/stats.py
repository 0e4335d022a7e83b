"""Means, standard deviations and intervals: what a few seeds or rules say, and how sure it is. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95
FEWEST = 3
"""Units that a verdict on a mean needs: with two, equal by chance, an interval would have no width."""
LEAST_COVERAGE = 0.9
"""Of an interval for a median that a verdict may use: the range of five values covers 93.75%, that of four 87.5%."""


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


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any] | None:
    """The mean of `ours - theirs` over the units that both have, with Student's interval, cut to [-1, 1].

    Both map a unit (a rule) to a score in [0, 1]. No mean difference lies outside [-1, 1], so the cut takes nothing
    from the coverage. Beside `mean`, `low`, `high` and `n`: `above` and `below`, the units where ours is better and
    worse. None: no unit in common.

    Why Student: with five differences a bootstrap's 95% interval, percentile or BCa, covers 80% to 85%, and no interval
    from the exact sign-flip test can leave 0 out (its smallest p is 2/32). Student's covers 95% of normal differences
    and of differences of Beta scores, 93% of skewed ones (Beta(2, 8)) and 88% of very skewed ones (Beta(.5, 2)).
    """
    differences = [ours[unit] - theirs[unit] for unit in sorted(ours.keys() & theirs.keys())]
    found = mean_ci(differences)
    if found is None:
        return None
    if found["low"] is not None:
        found = {**found, "low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
    return {**found, "above": sum(one > 0 for one in differences), "below": sum(one < 0 for one in differences)}


def median_ci(values: Iterable[float], at_least: Iterable[float] = ()) -> dict[str, Any] | None:
    """The median with an interval between two order statistics, where some values are only known from below.

    `at_least` are the values that are this or more: what was spent by runs that never got there. The lower limit takes
    them at their bound, the upper one as infinite, so nothing is dropped and both limits hold. `median` is itself only
    a bound where `median_at_least` is true; `high` is None where there is no upper limit. `coverage` is exact: that of
    the narrowest symmetric pair with 95% or more, and of the whole range where no pair has (five values: 93.75%).
    `coverage` of a single value is 0. None: no values.

    Source: the sign test turned round; H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed., section 7.1.
    """
    known, bounds = list(values), list(at_least)
    n = len(known) + len(bounds)
    if not n:
        return None
    from_below, from_above = sorted([*known, *bounds]), sorted([*known, *[math.inf] * len(bounds)])
    tails = [2 * math.fsum(math.comb(n, k) for k in range(place + 1)) / 2**n for place in range((n + 1) // 2)]
    place = max((place for place, tail in enumerate(tails) if 1 - tail >= CONFIDENCE), default=0)
    low, high = from_below[place], from_above[n - 1 - place]
    middle, most = _middle(from_below), _middle(from_above)
    return {
        "median": middle,
        "median_at_least": most > middle,
        "low": low,
        "high": None if math.isinf(high) else high,
        "n": n,
        "reached": len(known),
        "coverage": max(0.0, 1 - tails[place]),
    }


def verdict_more(found: Mapping[str, Any] | None, aim: float = 0.0) -> str:
    """`won` where a mean's whole interval is above the aim, `lost` where it is below, otherwise `undecided`."""
    if found is None or found["low"] is None or found["n"] < FEWEST:
        return "undecided"
    return "won" if found["low"] > aim else "lost" if found["high"] < aim else "undecided"


def verdict_less(found: Mapping[str, Any] | None, aim: float) -> str:
    """`won` where a median's whole interval is at most the aim, `lost` where it is above, otherwise `undecided`."""
    if found is None or found["coverage"] < LEAST_COVERAGE:
        return "undecided"
    if found["high"] is not None and found["high"] <= aim:
        return "won"
    return "lost" if found["low"] > aim else "undecided"


def _middle(ordered: Sequence[float]) -> float:
    """The median of sorted values."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
