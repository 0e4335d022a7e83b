"""The paired test by itself: values worked by hand, and how often it is wrong, by simulation."""

import math
import random

import pytest

from fst_optimizer.evolve.paired import ERROR, WORTH, verdict, wealth
from fst_optimizer.evolve.trial import Trial
from fst_optimizer.types import Candidate


def test_the_wealth_is_the_mean_over_the_stakes_of_what_bets_leave():
    assert wealth([]) == 1.0
    assert wealth([1.0]) == (1.25 + 1.5 + 1.75 + 2) / 4 == 1.625
    assert wealth([1.0, -1.0]) == (1.25 * 0.75 + 1.5 * 0.5 + 1.75 * 0.25 + 0) / 4 == 0.53125
    assert wealth([0.5]) == (1.125 + 1.25 + 1.375 + 1.5) / 4 == 1.3125
    assert wealth([1.0] * 4) == (2.44140625 + 5.0625 + 9.37890625 + 16) / 4
    assert wealth([0.0] * 9) == 1.0


def test_four_examples_better_decide_and_three_do_not():
    assert verdict([], [1.0] * 3) == "open"  # 4.67, and 5 are needed
    assert verdict([], [1.0] * 4) == "better"  # 8.22


def test_differences_beyond_one_count_as_one():
    assert verdict([], [1e9] * 3) == "open" and verdict([-1e9] * 2, []) == "open"


def test_what_the_reflector_read_says_nothing_for_a_proposal():
    assert verdict([1.0] * 9, []) == "open"


def test_no_difference_is_given_up_after_eight_examples_whoever_read_them():
    # A stake of s on 0 wins s / 3: (13/12)^8 = 1.90, (7/6)^8 = 3.43, (5/4)^8 = 5.96, (4/3)^8 = 9.99; mean 5.32.
    assert verdict([0.0] * 4, [0.0] * 3) == "open"  # 4.24
    assert verdict([0.0] * 4, [0.0] * 4) == "no better"
    assert verdict([0.0] * 8, []) == "no better"


def test_what_is_worse_is_given_up_after_three():
    # On -1 a stake of s wins 5 s / 3: 1.4167, 1.8333, 2.25 and 2.6667; cubes 2.84, 6.16, 11.39, 18.96, mean 9.84.
    assert verdict([-1.0] * 2, []) == "open"  # squares: mean 4.38
    assert verdict([-1.0] * 3, []) == "no better"


def test_the_order_changes_nothing():
    values = [1.0, 0.0, -0.5, 0.25, 1.0, 0.75]
    rng = random.Random(0)
    for _ in range(20):
        rng.shuffle(values)
        assert math.isclose(wealth(values), wealth(sorted(values)))


def wrong(draw, mistake, *, times=300, most=60, seed=0):
    """The share of sequences in which the test comes to `mistake`, looked at after every example."""
    rng, count = random.Random(seed), 0
    for _ in range(times):
        drawn = []
        for _ in range(most):
            drawn.append(draw(rng))
            found = verdict([], drawn)
            if found != "open":
                count += found == mistake
                break
    return count / times


NO_BETTER = {
    "equal": lambda rng: rng.choice((-1.0, 0.0, 1.0)),
    "often a little worse, seldom much better": lambda rng: 1.0 if rng.random() < 0.1 else -1 / 9,
    "often a little better, seldom much worse": lambda rng: -1.0 if rng.random() < 0.1 else 1 / 9,
    "graded": lambda rng: rng.uniform(-1, 1),
}
"""Differences with a mean of 0: the hardest case of those that are no better."""


@pytest.mark.parametrize("name", NO_BETTER)
def test_what_is_no_better_is_rarely_called_better(name):
    assert wrong(NO_BETTER[name], "better") <= ERROR


WORTH_IT = {
    "seldom much better": lambda rng: float(rng.random() < WORTH),
    "better and worse": lambda rng: 1.0 if rng.random() < (1 + WORTH) / 2 else -1.0,
    "graded": lambda rng: rng.uniform(WORTH - 0.5, WORTH + 0.5),
}
"""Differences with a mean of WORTH: the hardest case of those that should not be missed."""


@pytest.mark.parametrize("name", WORTH_IT)
def test_what_is_worth_it_is_rarely_given_up(name):
    assert wrong(WORTH_IT[name], "no better") <= ERROR


def test_what_is_much_better_is_nearly_always_found_on_twelve_examples():
    assert wrong(lambda rng: float(rng.random() < 0.7), "better", most=12) > 0.9


def trial(seen, fresh=(), **more):
    return Trial(Candidate({"first": "New."}), [0], {}, [], list(seen), list(fresh), **more)


LOST = math.nan


def test_a_trial_that_is_open_goes_by_its_sum():
    assert trial([(0.0, 1.0)]).passes_paired
    assert not trial([(0.5, 0.5)]).passes_paired
    assert trial([(0.5, 0.5)], ties=True).passes_paired
    assert not trial([(0.0, 1.0)], [(1.0, 0.5)] * 2).passes_paired
    assert not trial([(0.0, 0.0)] * 4, [(0.0, 0.0)] * 4, ties=True).passes_paired  # decided, not open
    assert trial([(0.0, 0.0)] * 4, [(0.0, 1.0)] * 4).passes_paired


def test_what_was_lost_is_left_out_and_half_must_be_there():
    assert trial([(LOST, 1.0), (0.0, 1.0)]).conclusive
    assert not trial([(LOST, 1.0), (0.0, 1.0), (0.0, LOST)]).conclusive
    assert trial([(0.0, LOST), (0.0, 1.0)]).sum_is_better
    assert trial([(0.0, LOST), (0.0, 0.5)]).told() == "open on 1 examples, by +0.500 on average"
