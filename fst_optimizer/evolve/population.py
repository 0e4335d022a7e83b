"""Which candidates stay: Pareto over scores. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from fst_optimizer.types import Population

Scores = Mapping[str, Mapping[str, float]]
"""Candidate id -> example id -> score, all at one policy version and over the same examples."""


def frontier(scores: Scores) -> tuple[str, ...]:
    """The ids that GEPA keeps as dominators, highest mean first; the earlier candidate wins a tie.

    A candidate is dropped, worst mean first, when each example that it is best on has another candidate as good that is
    still kept. What remains is best, together, on every example, and none of it can be spared.

    Source: `gepa.gepa_utils.find_dominator_programs`. GEPA leaves ties of equal means to the order of the
    examples; here the earlier candidate stays, so that a copy in other words does not push out its parent.
    """
    from gepa.gepa_utils import find_dominator_programs

    ids = list(scores)
    examples = {example for row in scores.values() for example in row}
    if not examples:
        return tuple(ids[:1])
    fronts = {}
    for example in sorted(examples):
        column = {index: scores[name][example] for index, name in enumerate(ids) if example in scores[name]}
        top = max(column.values())
        fronts[example] = {index for index, score in column.items() if score == top}
    means = [sum(row.values()) / max(1, len(row)) for row in scores.values()]
    worth = {index: (mean, -index) for index, mean in enumerate(means)}
    kept = find_dominator_programs(fronts, worth)  # type: ignore[no-untyped-call]
    return tuple(ids[index] for index in sorted(kept, key=worth.__getitem__, reverse=True))


def common_examples(scores: Scores) -> frozenset[str]:
    """The examples that every candidate has a score on."""
    rows = [frozenset(row) for row in scores.values()]
    return frozenset.intersection(*rows) if rows else frozenset()


def select(population: Population, k: int) -> Population:
    """The top `k` of the population's frontier, highest mean first, with their scores; fewer when it is smaller.

    The candidate with the highest mean always stays: dominance may drop it when specialists together match it on
    every example, and a policy should not train without its best instructions.
    """
    scores = {candidate.id: population.scores.get(candidate.id, {}) for candidate in population.candidates}
    by_id = {candidate.id: candidate for candidate in reversed(population.candidates)}
    best = population.best.id
    kept = (best, *(name for name in frontier(scores) if name != best))[:k]
    return Population(
        candidates=tuple(by_id[name] for name in kept),
        policy_version=population.policy_version,
        scores={name: dict(scores[name]) for name in kept},
    )
