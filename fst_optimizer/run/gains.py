"""What a fast round or some slow steps gained in score, with its noise: pure functions over scores of examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from fst_optimizer.types import Candidate, Stored

PRIOR_GAIN, PRIOR_SPREAD = 0.05, 0.1
"""Gain in score of a whole fast round, or of a cycle's slow steps, before anything is known of it: so both sides' gains
start out level, and the one whose phase is cheaper comes first."""
LEAST_SPREAD = 0.1
"""Standard deviation of scores below which it is not believed: by chance a few scores are all equal."""
BETTER = 1.28
"""Standard errors by which a prompt must lead the seed to be trained under: 90% one-sided."""


@dataclass(frozen=True)
class Evidence(Stored):
    """What is known of one side's gain per rollout, besides its prior: a precision and a mean weighted by it."""

    precision: float = 0.0
    weighted: float = 0.0

    def plus(self, gain: float, noise: float, rollouts: float) -> Evidence:
        """With a phase that gained so much, give or take the noise, for so many rollouts."""
        if rollouts <= 0 or noise <= 0:
            return self
        return Evidence(
            self.precision + (rollouts / noise) ** 2, self.weighted + (rollouts / noise) ** 2 * gain / rollouts
        )

    def kept(self, share: float) -> Evidence:
        """Of an age at which a share of it still counts."""
        return Evidence(share * self.precision, share * self.weighted)

    def posterior(self, rollouts: int) -> NormalDist:
        """The gain per rollout; `rollouts`: those of a whole phase of this side, which the prior is about."""
        prior = (rollouts / PRIOR_SPREAD) ** 2
        precision = prior + self.precision
        return NormalDist((prior * PRIOR_GAIN / rollouts + self.weighted) / precision, precision**-0.5)


@dataclass(frozen=True)
class Point(Stored):
    """A slow step: where it was, and what it earned."""

    rollouts: int
    """Slow ones until then."""
    reward: float
    variance: float
    """Of `reward`, the mean over the step's examples."""


def worth_training(
    candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, float]], seed: Candidate, new: int = 0
) -> tuple[Candidate, ...]:
    """The candidates that lead the seed with some confidence, in their order; the seed alone where none does.

    `new`: how many were found on these examples, so that the best of them leads by luck too. Where the seed has no
    score, nothing can be said: all of them.
    """
    if seed.id not in scores:
        return tuple(candidates)
    leading = []
    for one in candidates:
        if one.id != seed.id and one.id in scores:
            gain, noise = paired(scores[one.id], scores[seed.id])
            if gain >= (BETTER + luck(new)) * noise:
                leading.append(one)
    return tuple(leading) or (seed,)


def leader(scores: Mapping[str, Mapping[str, float]], among: Iterable[str]) -> str | None:
    """The id with the best mean; the earlier wins a tie."""
    known = [one for one in among if scores.get(one)]
    return max(known, key=lambda one: math.fsum(scores[one].values()) / len(scores[one]), default=None)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, float]:
    """The mean of `ours - theirs` over the examples that both have, and its standard error."""
    found = [ours[one] - theirs[one] for one in ours if one in theirs]
    if not found:
        return 0.0, 1.0
    mean = math.fsum(found) / len(found)
    variance = math.fsum((one - mean) ** 2 for one in found) / max(1, len(found) - 1)
    return mean, math.sqrt(max(variance, LEAST_SPREAD**2) / len(found))


def luck(candidates: int) -> float:
    """By how many standard errors the best of so many new candidates leads an equal old one, on average.

    The mean of the largest of n normal values is about that of the quantile (n - 3/8) / (n + 1/4), and the standard
    error of a difference is the square root of 2 times that of a value.

    Source: G. Blom, Statistical Estimates and Transformed Beta-Variables, 1958.
    """
    return 0.0 if candidates < 1 else NormalDist().inv_cdf((candidates + 0.625) / (candidates + 1.25)) / math.sqrt(2)


def slope(points: Sequence[Point]) -> tuple[float, float] | None:
    """The reward's rise per rollout by weighted least squares, and its standard error. None: fewer than two points."""
    total = math.fsum(1 / one.variance for one in points)
    if len(points) < 2:
        return None
    center = math.fsum(one.rollouts / one.variance for one in points) / total
    squares = math.fsum((one.rollouts - center) ** 2 / one.variance for one in points)
    if not squares:
        return None
    rise = math.fsum((one.rollouts - center) * one.reward / one.variance for one in points) / squares
    return rise, squares**-0.5
