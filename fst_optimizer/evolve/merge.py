"""GEPA's merge: two candidates that are good at different things, combined text by text. Pure functions.

Source: `gepa.proposer.merge` of GEPA 0.1.4, with which ours differs in three ways. The pair is the one that would be
best if each example went to the better of the two, not one at random: there is most to gain. A common ancestor that is
not in the population any more is replaced by the program's own instructions, from which all are descended. And nothing
depends on the order of a set: GEPA's own merge differs from process to process, and a resumed run must do the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from fst_optimizer.types import Candidate, Texts


def by_gain(names: Sequence[str], scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """All pairs of candidates, those first whose better scores, example by example, have the highest mean.

    In each pair the one with the higher mean comes first. Ties go by the order of `names`.
    """

    def total(name: str) -> float:
        return sum(scores[name].values())

    def best_of_both(pair: tuple[str, str]) -> float:
        one, other = (scores[name] for name in pair)
        return sum(max(one[example], other[example]) for example in one.keys() & other.keys())

    pairs = [(one, other) if total(one) >= total(other) else (other, one) for one, other in combinations(names, 2)]
    return sorted(pairs, key=best_of_both, reverse=True)


def next_merge(
    names: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    known: Mapping[str, Candidate],
    root: Candidate,
    cycle: int,
) -> Candidate | None:
    """The first merge of two of these candidates that is not known yet; None where nothing is left to merge.

    `scores` may have more than those of whole programs, such as each predictor's on each example. `known` has all
    candidates of the round by their ids, `root` the program's own instructions. As in GEPA, two are not merged where
    their ancestor is better than one of them.
    """

    def ahead(ancestor: Candidate, name: str) -> bool:
        row = scores.get(ancestor.id)
        return row is not None and sum(row.values()) > sum(scores[name].values())

    for pair in by_gain(names, scores):
        one, other = (known[name] for name in pair)
        ancestor = common_ancestor(one, other, known, root)
        if ancestor is None or any(ahead(ancestor, name) for name in pair):
            continue
        child = Candidate(merged(ancestor.texts, one.texts, other.texts), pair, "merge", cycle)
        if child.id not in known:
            return child
    return None


def common_ancestor(
    one: Candidate, other: Candidate, known: Mapping[str, Candidate], root: Candidate
) -> Candidate | None:
    """The nearest known candidate that both come from, else `root`, from which all do.

    None where one of the two comes from the other: it has what the other had to give.
    """
    lines = [_line(candidate, known) for candidate in (one, other)]
    if one.id in (root.id, *lines[1]) or other.id in (root.id, *lines[0]):
        return None
    return next((known[name] for name in lines[0] if name in lines[1] and name in known), root)


def _line(candidate: Candidate, known: Mapping[str, Candidate]) -> list[str]:
    """Ids of all ancestors, the nearest first."""
    found: dict[str, None] = {}
    waiting = list(candidate.parents)
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting += known[name].parents if name in known else ()
    return list(found)


def merged(ancestor: Texts, one: Texts, other: Texts) -> dict[str, str]:
    """Each text from the one that changed it; where both did, that of `one`, the better of the two."""
    return {name: other[name] if text == ancestor[name] else text for name, text in one.items()}


def telling_examples(one: Mapping[str, float], other: Mapping[str, float], count: int, seed: str) -> list[str]:
    """Examples to try a merge on: in turns one that the first is better on, the second is, and both are equal on."""
    common = sorted(one.keys() & other.keys())
    random.Random(seed).shuffle(common)
    thirds = (
        [name for name in common if one[name] > other[name]],
        [name for name in common if one[name] < other[name]],
        [name for name in common if one[name] == other[name]],
    )
    turns = [name for place in range(len(common)) for third in thirds for name in third[place : place + 1]]
    return turns[:count]
