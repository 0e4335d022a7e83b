import random

import pytest

from fst_optimizer.lab import ceiling as module
from fst_optimizer.lab.ceiling import ceiling, fitted, level_at, with_interval
from fst_optimizer.lab.curves import Point

COSTS = (50, 100, 200, 400, 800)


def levelling(costs, noise=0.0, top=0.6):
    """R0 = 0.2, A = R0 + top, C_mid = 200, B = 2, with noise of this standard deviation."""
    draw = random.Random("ceiling")
    return [
        Point(0, 0.2, 0),
        *(Point(cost, 0.2 + top / (1 + (200 / cost) ** 2) + draw.gauss(0, noise), 0) for cost in costs),
    ]


def rising(costs, noise=0.0):
    """A power law: it never levels off."""
    draw = random.Random("rising")
    return [Point(0, 0.2, 0), *(Point(cost, 0.2 + 0.02 * cost**0.5 + draw.gauss(0, noise), 0) for cost in costs)]


def test_the_ceiling_of_an_exact_curve_is_found():
    # At C = 100 the score is 0.2 + 0.6 / (1 + 4) = 0.32.
    curve = levelling(COSTS)
    assert curve[2].score == pytest.approx(0.32)
    found = ceiling(curve)
    assert found["A"] == pytest.approx(0.8, abs=1e-3)
    assert found["C_mid"] == pytest.approx(200, rel=1e-2)
    assert found["B"] == pytest.approx(2, rel=1e-2)
    assert level_at(found, 0.2, 100) == pytest.approx(0.32, abs=1e-3)
    assert level_at(found, 0.2, 0) == 0.2


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (levelling(COSTS[:4]), module.TOO_FEW),
        ([Point(c, 0.5, 0) for c in range(6)], module.NO_GAIN),
        ([Point(c, 0.1 + 0.0009 * c, 0) for c in range(0, 1000, 100)], module.NO_BEND),  # a straight line
        (rising(range(100, 1100, 100)), module.NO_BEND),
        (rising(range(100, 1100, 100), noise=0.02), module.NO_BEND),
        (levelling(range(50, 650, 50), top=0.8), module.NO_BEND),  # its ceiling would be 1, and 0.92 was measured
        (levelling((20, 30, 40, 60, 80)), module.NO_BEND),  # less than half of the way was measured
        ([Point(0, 0.2, 0), *(Point(c, 0.2 if c < 250 else 0.6, 0) for c in range(100, 600, 100))], module.JUMP),
    ],
)
def test_where_no_ceiling_can_be_told_it_is_said_why(curve, why):
    assert fitted(curve) == why
    assert ceiling(curve) is None
    assert with_interval(curve) == {"A": None, "C_mid": None, "B": None, "low": None, "high": None, "why": why}


def test_the_interval_of_an_exact_curve_is_a_point_and_noise_widens_it():
    exact = with_interval(levelling(COSTS), resamples=60)
    assert exact["high"] - exact["low"] < 1e-3 and exact["why"] is None
    noisy = with_interval(levelling(range(50, 1050, 50), noise=0.03), resamples=60)
    noisier = with_interval(levelling(range(50, 1050, 50), noise=0.06), resamples=60)
    assert noisy["low"] < noisy["A"] < noisy["high"]
    assert 0.01 < noisy["high"] - noisy["low"] < noisier["high"] - noisier["low"]


def test_the_interval_is_the_same_each_time_and_ends_at_1():
    curve = levelling(range(50, 1250, 50), noise=0.03, top=0.75)
    found = with_interval(curve, resamples=60)
    assert found == with_interval(curve, resamples=60)
    assert found["high"] <= 1.0


def test_most_intervals_of_95_percent_hold_the_true_ceiling():
    held = []
    for number in range(20):
        draw = random.Random(f"coverage/{number}")
        curve = [
            Point(p.rollouts, p.score + (draw.gauss(0, 0.02) if p.rollouts else 0), 0)
            for p in levelling(range(50, 1250, 50))
        ]
        found = with_interval(curve, seed=number, resamples=60)
        held.append(found["low"] <= 0.8 <= found["high"])
    assert sum(held) >= 16  # of 20; fewer than that happens once in 3000 at 95%
