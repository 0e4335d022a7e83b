import pytest
from scipy.stats import quantile_test, ttest_rel

from fst_optimizer.stats import (
    mean,
    mean_ci,
    median_ci,
    paired_difference,
    standard_error,
    std,
    verdict_less,
    verdict_more,
)


def test_the_mean_is_summed_exactly():
    assert mean([1e16, 1.0, -1e16]) == 1 / 3


def test_a_samples_deviation_is_divided_by_n_less_one():
    # Mean 3, squares 4 + 0 + 4 = 8: 8 / 2 and 8 / 3.
    assert std([1.0, 3.0, 5.0]) == 2.0
    assert std([1.0, 3.0, 5.0], ddof=0) == pytest.approx((8 / 3) ** 0.5)


def test_the_standard_error_is_the_binomial_bound():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0.0


def test_the_interval_is_students():
    found = mean_ci([1.0, None, 2.0, 3.0])
    # t(0.975, 2) = 4.30265; the standard deviation is 1, so the half width is 4.30265 / sqrt(3) = 2.48414.
    assert (found["mean"], found["n"]) == (2.0, 3)
    assert found["low"] == pytest.approx(2 - 2.48414, abs=1e-5)
    assert found["high"] == pytest.approx(2 + 2.48414, abs=1e-5)


def test_one_value_has_a_mean_and_no_interval():
    assert mean_ci([0.4]) == {"mean": 0.4, "low": None, "high": None, "n": 1}
    assert mean_ci([]) is None and mean_ci([None]) is None


OURS = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.9, "e": 1.0, "only ours": 0.1}
THEIRS = {"a": 0.8, "b": 0.6, "c": 0.4, "d": 0.5, "e": 0.5, "only theirs": 0.9}


def test_a_difference_is_paired_by_rule_and_students():
    found = paired_difference(OURS, THEIRS)
    # .1 to .5: mean .3, variance .025; t(0.975, 4) = 2.776445: the half width is 2.776445 * sqrt(.025 / 5) = .196324.
    assert found["mean"] == pytest.approx(0.3) and found["n"] == 5
    assert (found["low"], found["high"]) == pytest.approx((0.3 - 0.196324, 0.3 + 0.196324), abs=1e-6)
    assert (found["above"], found["below"]) == (5, 0)
    common = sorted(OURS.keys() & THEIRS.keys())
    theirs = ttest_rel([OURS[rule] for rule in common], [THEIRS[rule] for rule in common]).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high))


def test_no_difference_of_scores_is_beyond_one():
    found = paired_difference({"a": 1.0, "b": 1.0, "c": 0.2}, {"a": 0.0, "b": 0.1, "c": 0.1})
    # 1, .9 and .1: without the cut the upper limit is .667 + 4.303 * .493 / sqrt(3) = 1.89.
    assert found["high"] == 1.0 and found["low"] == pytest.approx(0.6667 - 4.3027 * 0.49329 / 3**0.5, abs=1e-3)
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None
    assert paired_difference({"a": 1.0}, {"a": 0.4})["low"] is None


def test_the_interval_of_five_covers_what_it_says():
    numpy = pytest.importorskip("numpy")
    draws = numpy.random.default_rng(0).normal(0.1, 0.1, (2000, 5))
    found = [mean_ci(row.tolist()) for row in draws]
    held = sum(one["low"] <= 0.1 <= one["high"] for one in found) / len(found)
    assert 0.935 < held < 0.965


def test_a_median_lies_between_two_order_statistics():
    values = [3.0, 1.0, 2.0, 10.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    found = median_ci(values)
    # Of ten coins at most one is heads with probability 11 / 1024 on either side; at most two, 56 / 1024, is too much.
    assert (found["median"], found["low"], found["high"]) == (5.5, 2.0, 9.0)
    assert found["coverage"] == pytest.approx(1 - 22 / 1024)
    theirs = quantile_test(values, p=0.5).confidence_interval(0.95)
    assert (found["low"], found["high"]) == (theirs.low, theirs.high)


def test_five_values_have_their_range_and_it_says_what_it_covers():
    found = median_ci([0.1, 0.2, 0.3, 0.25, 0.15])
    assert (found["median"], found["low"], found["high"], found["coverage"]) == (0.2, 0.1, 0.3, 1 - 2 / 32)
    assert median_ci([]) is None and median_ci([0.5])["coverage"] == 0


def test_what_never_got_there_counts_from_what_it_spent():
    found = median_ci([0.1, 0.2, 0.3], at_least=[1.5, 2.0])
    assert (found["median"], found["median_at_least"], found["low"], found["high"]) == (0.3, False, 0.1, None)
    assert (found["reached"], found["n"]) == (3, 5)
    # Where most never got there the median is itself only known from below; a bound below a value that was reached
    # pulls the lower limit down, never up.
    assert median_ci([0.9], at_least=[1.0, 1.2])["median_at_least"] is True
    assert median_ci([0.9], at_least=[0.2, 1.2])["low"] == 0.2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.3, "won"), (-0.3, -0.01, "lost"), (-0.01, 0.3, "undecided"), (0.0, 0.3, "undecided")],
)
def test_a_difference_is_decided_where_its_interval_leaves_out_the_aim(low, high, expected):
    assert verdict_more({"low": low, "high": high, "n": 5}) == expected
    assert verdict_more({"low": low, "high": high, "n": 2}) == "undecided"
    assert verdict_more({"low": low + 0.1, "high": high + 0.1, "n": 5}, 0.1) == expected


def test_a_share_is_won_below_the_aim_lost_above_and_undecided_across_it():
    assert verdict_less(median_ci([0.1, 0.2, 0.3, 0.3, 0.3]), 1 / 3) == "won"
    assert verdict_less(median_ci([0.4, 0.5], at_least=[0.9, 1.0, 1.0]), 1 / 3) == "lost"
    assert verdict_less(median_ci([0.1, 0.2, 0.3], at_least=[1.0, 1.0]), 1 / 3) == "undecided"
    assert verdict_less(median_ci([0.1, 0.2, 0.3, 0.3]), 1 / 3) == "undecided"  # the range of four covers 87.5%
    assert verdict_less(None, 1 / 3) == verdict_more(None) == "undecided"
    assert verdict_more(mean_ci([0.5])) == "undecided"
