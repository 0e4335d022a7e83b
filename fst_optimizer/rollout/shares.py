"""How many of a group's rollouts each prompt gets: evenly, or by how likely it is to be the best. Pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from fst_optimizer.types import Population

DRAWS = 1000
"""Weightings of the examples that a posterior is made of."""
OPEN = 0.1
"""A prompt is out of the question once its probability of being the best is below this part of an even share."""
FEWEST = 2
"""Rollouts of a prompt that is in a group: one alone says nothing about what sampling does."""


def allocate_rollouts(group_size: int, candidates: int) -> tuple[int, ...]:
    """How many of a group's rollouts each candidate gets: as even as possible, the better ones take the remainder.

    `allocate_rollouts(8, 3)` is `(3, 3, 2)`. It sums to `group_size`; candidates beyond `group_size` get none.
    """
    if candidates < 1 or group_size < 0:
        raise ValueError(f"cannot allocate {group_size} rollouts over {candidates} candidates")
    each, over = divmod(group_size, candidates)
    return tuple(each + (index < over) for index in range(candidates))


def shares_of(population: Population, group_size: int, how: str) -> tuple[int, ...]:
    """How many of a group's rollouts each candidate of a population gets; `how` is `rollout.shares`.

    Without scores on common examples (before the first fast round, after a search), evenly.
    """
    rows = [population.scores.get(candidate.id, {}) for candidate in population.candidates]
    if how == "equal" or not (set.intersection(*map(set, rows)) if rows else ()):
        return allocate_rollouts(group_size, len(rows))
    return allocate_by(best_probabilities(rows), group_size)


def best_probabilities(rows: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """How likely each candidate is to have the highest mean, given its scores by example; they sum to 1.

    A Bayesian bootstrap (Rubin, 1981) over the examples that all have: examples get random weights, in every drawing
    the same ones for all candidates, so that what makes an example hard for all says nothing. To each candidate's
    favour an example is added on which it alone scores 1. So, where scores are 0 or 1, n wins against no loss leave the
    other candidate 1 / 2^(n + 1), and a single win proves little. Ties are shared.

    Raising a score never lowers its candidate's probability nor raises another's: the drawings are always the same.
    """
    common = sorted(set.intersection(*map(set, rows)))
    uneven = [place for place, name in enumerate(common) if len({row[name] for row in rows}) > 1]
    unit = math.lcm(*range(1, len(rows) + 1))
    rng, wins = random.Random(f"shares/{len(common)}/{len(rows)}"), [0] * len(rows)
    for _ in range(DRAWS):
        weights, own = _exponentials(rng, len(common)), _exponentials(rng, len(rows))
        sums = [math.fsum(weights[place] * row[common[place]] for place in uneven) for row in rows]
        for turn in range(len(rows)):  # each candidate once with each of the added examples: no luck but that of scores
            values = [total + own[(place + turn) % len(rows)] for place, total in enumerate(sums)]
            top = max(values)
            winners = [place for place, value in enumerate(values) if value == top]
            for place in winners:
                wins[place] += unit // len(winners)
    return tuple(count / (DRAWS * len(rows) * unit) for count in wins)


def _exponentials(rng: random.Random, count: int) -> list[float]:
    """Weights that are, over their sum, uniform among all that sum to 1; the sum decides no rank."""
    return [-math.log(1.0 - rng.random()) for _ in range(count)]


def allocate_by(probabilities: Sequence[float], group_size: int) -> tuple[int, ...]:
    """A group's rollouts by the candidates' probabilities of being the best; `group_size` is at least 1.

    Each one that is not out of the question gets `FEWEST`, and what is left goes by the probabilities of these, the
    largest remainders rounded up. Where there are more of them than the group has room for, it has the most probable
    ones. The earlier candidate, which has the higher mean, wins a tie. With a higher probability, the others' being no
    higher, no candidate gets less.
    """
    order = sorted(range(len(probabilities)), key=lambda place: -probabilities[place])
    bound = OPEN / len(probabilities)
    room = max(1, group_size // FEWEST)
    members = [place for place in order if probabilities[place] >= bound][:room]
    least = min(FEWEST, group_size)
    total = math.fsum(probabilities[place] for place in members)
    spare = group_size - least * len(members)
    quotas = {place: spare * probabilities[place] / total for place in members}
    counts = {place: math.floor(quotas[place]) for place in members}
    rounded_up = sorted(members, key=lambda place: counts[place] - quotas[place])[: spare - sum(counts.values())]
    return tuple(
        least + counts[place] + (place in rounded_up) if place in counts else 0 for place in range(len(probabilities))
    )
