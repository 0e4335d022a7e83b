"""Gains and their noise, worked by hand."""

import math

import pytest

from fst_optimizer.run.gains import Evidence, Point, leader, luck, paired, slope, worth_training
from fst_optimizer.types import Candidate

SEED, GOOD, UNSURE = (Candidate({"answer": text}) for text in ("Say it.", "Say it backwards.", "Say something."))


def test_a_paired_difference_is_over_the_examples_that_both_have():
    # .5, .1 and .3: mean .3, variance .04, of three examples.
    gain, noise = paired({"a": 1.0, "b": 0.5, "c": 0.5, "d": 1.0}, {"a": 0.5, "b": 0.4, "c": 0.2, "e": 0.0})
    assert (gain, noise) == (pytest.approx(0.3), pytest.approx(0.2 / math.sqrt(3)))
    # All equal by chance: the spread is taken as .1.
    assert paired({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == (0.0, pytest.approx(0.1 / math.sqrt(2)))
    assert paired({"a": 1.0}, {"b": 1.0}) == (0.0, 1.0)


def test_the_best_of_more_equal_candidates_leads_by_more_luck():
    # The mean of the largest of n + 1 normal values (.564, .846, 1.163 of 2, 3 and 5) over the square root of 2.
    assert luck(0) == 0
    for candidates, largest in ((1, 0.564), (2, 0.846), (4, 1.163)):
        assert luck(candidates) == pytest.approx(largest / math.sqrt(2), abs=0.02)


def test_a_slope_and_its_error():
    points = [Point(64 * step, 0.1 + 0.05 * step, 0.01) for step in (1, 2, 3)]
    rise, error = slope(points)
    assert rise == pytest.approx(0.05 / 64)
    assert error == pytest.approx(math.sqrt(0.01 / (2 * 64**2)))
    # A step of which nothing is known weighs nothing.
    assert slope([*points, Point(256, 0.0, 1e9)])[0] == pytest.approx(0.05 / 64, rel=1e-4)
    assert slope(points[:1]) is slope([]) is slope([points[0]] * 2) is None


def test_a_posterior_weighs_the_prior_by_its_precision():
    # The prior of a phase of 100 rollouts: .0005 a rollout, give or take .001.
    prior = Evidence().posterior(100)
    assert (prior.mean, prior.stdev) == (pytest.approx(0.0005), pytest.approx(0.001))
    # A phase that gained .2 in 100 rollouts with as much noise as the prior has: half way between both.
    known = Evidence().plus(0.2, 0.1, 100)
    found = known.posterior(100)
    assert (found.mean, found.stdev) == (pytest.approx(0.00125), pytest.approx(0.001 / math.sqrt(2)))
    # Half forgotten it counts half: (2 * .0005 + .002) / 3.
    assert known.kept(0.5).posterior(100).mean == pytest.approx(0.001)
    assert Evidence().plus(0.2, 0.1, 0) == Evidence()


def test_what_leads_the_seed_by_chance_is_not_worth_training_under():
    scores = {
        SEED.id: {"a": 0.0, "b": 0.5, "c": 0.5, "d": 0.0},
        GOOD.id: {"a": 0.5, "b": 0.9, "c": 1.0, "d": 0.4},
        UNSURE.id: {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.0},  # .125, give or take .31
    }
    assert worth_training((GOOD, UNSURE, SEED), scores, SEED) == (GOOD,)
    assert worth_training((UNSURE,), scores, SEED) == (SEED,)
    assert worth_training((SEED,), scores, SEED) == (SEED,)
    # GOOD leads by .45, give or take .05: no number of new ones has so much luck.
    assert worth_training((GOOD, UNSURE), scores, SEED, new=12) == (GOOD,)
    lucky = {SEED.id: {"a": 0.0, "b": 0.0}, GOOD.id: {"a": 0.1, "b": 0.1}}  # 1.41 standard errors
    assert worth_training((GOOD,), lucky, SEED) == (GOOD,) and worth_training((GOOD,), lucky, SEED, new=1) == (SEED,)
    # Without scores of the seed nothing can be said.
    assert worth_training((GOOD, UNSURE), {GOOD.id: {"a": 1.0}}, SEED) == (GOOD, UNSURE)
    assert leader(scores, [UNSURE.id, GOOD.id, "unknown"]) == GOOD.id and leader({}, [SEED.id]) is None
