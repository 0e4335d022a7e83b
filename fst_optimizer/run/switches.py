"""Notices that the task has changed, from scores and feedback alone: pure functions over what a stream's phases saw.

Three signs, each enough: scores of slow steps below their level since the last switch (a one-sided CUSUM, Page 1954, of
drops over their own noise); the leading candidate's scores at the start of a fast round below those at the end of the
one before (a t-test); and feedback in which a sentence recurs that none had before. A change to a task that is solved
as well as the one before shows in the feedback or not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fst_optimizer.types import Stored

ALLOWANCE = 0.5
"""What a drop counts less, in its own standard errors: smaller ones never sum up to an alarm."""
ALARM = 6.0
"""The sum of drops, in standard errors, that is an alarm."""
FALL = 4.5
"""The drop in standard errors between two fast rounds that is an alarm: in the first, the leader led by luck too."""
LEAST_SPREAD = 0.1
"""Standard deviation of scores below which it is not believed: by chance a few scores are all equal."""
WEIGHT = 0.1
"""Of the newest step in the level; of the first ones more, so that all count the same."""
MOST_SENTENCES = 500
"""Sentences of the feedback that are remembered."""


@dataclass(frozen=True)
class Level(Stored):
    """Where the scores of slow steps are."""

    mean: float
    variance: float
    """Of an example's score, pooled."""
    size: float
    """Examples that the mean stands for."""
    steps: int = 1
    drop: float = 0.0
    """The sum of drops so far, in standard errors, never below 0."""


@dataclass(frozen=True)
class Lookout(Stored):
    """What has been seen since the last switch."""

    level: Level | None = None
    """None: no slow step yet."""
    said: tuple[str, ...] = ()
    """Sentences that recurred in the feedback."""


def after_scores(seen: Lookout, scores: Sequence[float]) -> tuple[Lookout, bool]:
    """After a slow step: what is seen now, and whether it is a switch. `scores`: the mean of each example."""
    if not scores:
        return seen, False
    mean, variance = _moments(scores)
    fresh = Level(mean, variance, len(scores))
    if seen.level is None:
        return replace(seen, level=fresh), False
    old = seen.level
    variance = _pooled((old.variance, old.size), (variance, len(scores)))
    drop = max(0.0, old.drop + (old.mean - mean) / _error(variance, old.size, len(scores)) - ALLOWANCE)
    if drop > ALARM:
        return Lookout(fresh), True
    weight = max(1 / (old.steps + 1), WEIGHT)
    size = min(old.size + len(scores), len(scores) * (2 - WEIGHT) / WEIGHT)
    level = Level(old.mean + weight * (mean - old.mean), variance, size, old.steps + 1, drop)
    return replace(seen, level=level), False


def fell(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the leading candidate does so much worse than in the last fast round. Too few examples say nothing."""
    if min(len(before), len(now)) < 2:
        return False
    (was, spread), (is_now, spread_now) = _moments(before), _moments(now)
    variance = _pooled((spread, len(before)), (spread_now, len(now)))
    return (was - is_now) / _error(variance, len(before), len(now)) > FALL


def after_feedback(seen: Lookout, said: Sequence[Iterable[str]]) -> tuple[Lookout, bool]:
    """After a fast round: what is seen now, and whether it is a switch.

    `said` has the sentences about each rollout that was not perfect. What is said of most of them (at least two) says
    what is asked for; where some of that is new, something else is asked for.
    """
    counts = Counter(sentence for one in said for sentence in dict.fromkeys(one))
    recurring = tuple(sentence for sentence, count in counts.items() if count >= max(2, len(said) / 2))
    new = [sentence for sentence in recurring if sentence not in seen.said]
    if seen.said and new:
        return Lookout(said=recurring[-MOST_SENTENCES:]), True
    return replace(seen, said=(*seen.said, *new)[-MOST_SENTENCES:]), False


def _moments(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, and variance of the single score (0 of one alone)."""
    mean = math.fsum(scores) / len(scores)
    return mean, math.fsum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)


def _pooled(*samples: tuple[float, float]) -> float:
    """The variance of several samples (variance, size) together."""
    free = sum(size - 1 for _, size in samples)
    return sum(variance * (size - 1) for variance, size in samples) / free if free else 0.0


def _error(variance: float, *sizes: float) -> float:
    """The standard error of the difference of two means."""
    return math.sqrt(max(variance, LEAST_SPREAD**2) * sum(1 / size for size in sizes))
