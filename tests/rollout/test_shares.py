"""Who gets how many rollouts of a group: worked by hand, and what holds whatever the scores."""

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.rollout.shares import FEWEST, allocate_by, allocate_rollouts, best_probabilities, shares_of
from fst_optimizer.types import Candidate, Population

NOISE = 0.02
"""Of a probability from 1000 drawings."""


@given(st.integers(0, 64), st.integers(1, 12))
def test_shares_sum_to_the_group_are_even_and_favour_the_first(group_size, candidates):
    shares = allocate_rollouts(group_size, candidates)
    assert len(shares) == candidates
    assert sum(shares) == group_size
    assert max(shares) - min(shares) <= 1
    assert list(shares) == sorted(shares, reverse=True)


def test_shares_by_hand():
    assert allocate_rollouts(8, 3) == (3, 3, 2)
    assert allocate_rollouts(8, 4) == (2, 2, 2, 2)
    assert allocate_rollouts(2, 3) == (1, 1, 0)


@pytest.mark.parametrize(("group_size", "candidates"), [(8, 0), (-1, 2)])
def test_allocation_refuses_what_cannot_be_shared(group_size, candidates):
    with pytest.raises(ValueError, match="cannot allocate"):
        allocate_rollouts(group_size, candidates)


# -- how likely each is the best -----------------------------------------------------------------------------------


def row(*scores):
    return {f"train-{place}": score for place, score in enumerate(scores)}


def sign_test(wins, losses):
    """The probability that a coin with so many heads and tails prefers heads, before which every bias was as likely.

    P(Beta(wins + 1, losses + 1) > 1/2), which is P(Binomial(wins + losses + 1, 1/2) <= wins).
    """
    n = wins + losses + 1
    return sum(comb(n, k) for k in range(wins + 1)) / 2**n


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (3, 0), (6, 0), (3, 1), (4, 4), (7, 2)])
def test_between_two_candidates_it_is_a_sign_test_with_an_even_prior(wins, losses):
    ours, theirs = row(*[1] * wins, *[0] * losses), row(*[0] * wins, *[1] * losses)
    assert best_probabilities([ours, theirs])[0] == pytest.approx(sign_test(wins, losses), abs=NOISE)


def test_the_sign_test_by_hand():
    assert sign_test(1, 0) == 3 / 4  # after one win; 1 / 2^(n + 1) is left to the other after n
    assert sign_test(3, 0) == 15 / 16
    assert sign_test(3, 1) == 26 / 32  # 1 + 5 + 10 + 10 of 32


def test_examples_that_all_score_alike_say_nothing():
    assert best_probabilities([row(1, 1, 0), row(1, 1, 0), row(1, 1, 0)]) == (1 / 3,) * 3
    hard = best_probabilities([row(1, *[0] * 15), row(0, *[0] * 15)])
    easy = best_probabilities([row(1, *[1] * 15), row(0, *[1] * 15)])
    assert hard == easy and hard[0] == pytest.approx(0.75, abs=NOISE)


def test_scores_are_compared_example_by_example():
    # The means are .525 and .475 with a spread of .5: a coin toss, were they not of the same examples.
    hard_and_easy = [0.05, 1.0] * 16
    ahead, behind = row(*hard_and_easy), row(*[score - 0.05 for score in hard_and_easy])
    assert best_probabilities([ahead, behind])[0] > 0.8


def test_only_common_examples_count():
    ours, theirs = row(1, 0), {"train-1": 0, "train-7": 1}
    assert best_probabilities([ours, theirs]) == (0.5, 0.5)


SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0])
TABLES = st.integers(2, 4).flatmap(
    lambda examples: st.lists(st.lists(SCORES, min_size=examples, max_size=examples), min_size=2, max_size=5)
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.data())
def test_a_higher_score_never_costs_its_candidate_anything_nor_helps_another(table, data):
    place = data.draw(st.integers(0, len(table) - 1))
    example = data.draw(st.integers(0, len(table[0]) - 1))
    raised = [list(scores) for scores in table]
    raised[place][example] += data.draw(st.sampled_from([1e-9, 0.25, 1.0]))
    before, after = (best_probabilities([row(*scores) for scores in rows]) for rows in (table, raised))
    assert sum(before) == pytest.approx(1) == sum(after)
    assert after[place] >= before[place]
    assert all(now <= was for now, was, other in zip(after, before, range(len(table)), strict=True) if other != place)
    for group_size in (2, 8, 16):
        assert allocate_by(after, group_size)[place] >= allocate_by(before, group_size)[place]


# -- who gets what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "group_size", "shares"),
    [
        ((0.75, 0.25), 8, (5, 3)),  # two each, and 3 : 1 of the other four
        ((0.25, 0.75), 8, (3, 5)),
        ((0.97, 0.03), 8, (8, 0)),  # below a tenth of an even share, which is .05 of two
        ((0.9375, 0.0625), 8, (6, 2)),  # 3.75 and .25 of four: 3 + 0, the larger remainder is rounded up
        ((0.4, 0.3, 0.2, 0.1), 8, (2, 2, 2, 2)),  # all open: nothing is left to share
        ((0.6, 0.3, 0.09, 0.01), 8, (3, 3, 2, 0)),  # 1.21, .61 and .18 of two
        ((0.6, 0.3, 0.09, 0.01), 16, (8, 5, 3, 0)),  # 6.06, 3.03 and .91 of ten
        ((0.25,) * 4, 4, (2, 2, 0, 0)),  # room for two, the earlier win the tie
        ((0.1, 0.2, 0.3, 0.4), 4, (0, 0, 2, 2)),
        ((0.5, 0.5), 9, (5, 4)),
        ((1.0,), 8, (8,)),
        ((0.4, 0.6), 2, (0, 2)),
        ((0.4, 0.6), 3, (0, 3)),
    ],
)
def test_allocation_by_hand(probabilities, group_size, shares):
    assert allocate_by(probabilities, group_size) == shares


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12).filter(any), st.integers(2, 64))
def test_shares_by_probability_sum_to_the_group_and_nobody_is_alone(weights, group_size):
    shares = allocate_by([weight / sum(weights) for weight in weights], group_size)
    assert sum(shares) == group_size
    assert all(share == 0 or share >= FEWEST for share in shares)
    by_weight = sorted(zip(weights, shares, strict=True))
    assert [share for _, share in by_weight] == sorted(shares) or len(set(weights)) < len(weights)
    # One that is at least as likely as an even share is always in, where there is room.
    assert all(share for weight, share in zip(weights, shares, strict=True) if weight * 2 > sum(weights))


# -- of a population -----------------------------------------------------------------------------------------------

A, B, C = (Candidate({"p": text}) for text in "abc")


def test_a_population_with_scores_is_shared_by_them_and_evenly_by_default():
    clear = Population((A, B), 3, {A.id: row(*[1] * 8), B.id: row(*[0] * 8)})
    assert shares_of(clear, 8, "equal") == (4, 4)
    assert shares_of(clear, 8, "posterior") == (8, 0)
    close = Population((A, B), 3, {A.id: row(1, 0), B.id: row(0, 0)})
    assert shares_of(close, 8, "posterior") == (5, 3)


def test_without_common_scores_the_group_is_shared_evenly():
    for scores in ({}, {A.id: row(1)}, {A.id: {"train-0": 1.0}, B.id: {"train-1": 0.0}, C.id: {}}):
        assert shares_of(Population((A, B, C), 0, scores), 8, "posterior") == (3, 3, 2)
