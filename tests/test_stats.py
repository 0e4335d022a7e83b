import pytest

from fst_optimizer.stats import mean, mean_ci, standard_error, std


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
