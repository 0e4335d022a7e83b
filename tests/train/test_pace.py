import math

import pytest
import torch

from fst_optimizer.model import lora
from fst_optimizer.train import pace
from fst_optimizer.train.pace import hold_back, next_bonus, next_scale, sampled_entropy, shortened, too_far


@pytest.mark.parametrize(
    ("kl", "shorten"), [(0.0, False), (0.01, False), (0.015, False), (0.0151, True), (math.inf, True), (math.nan, True)]
)
def test_a_step_may_make_half_as_much_again_as_its_target(kl, shorten):
    assert too_far(kl, 0.01) is shorten


@pytest.mark.parametrize(
    ("share", "kl", "kept"),
    [
        (1.0, 0.04, 0.5),  # four times the target: half of the step, as KL grows with its square
        (0.5, 0.09, 0.5 / 3),
        (1.0, 0.0101, 0.9),  # always shorter
        (1.0, 100.0, 0.1),  # never by more than a tenth at once
        (1.0, math.nan, 0.1),
        (0.1, math.inf, 0.01),
    ],
)
def test_a_step_is_shortened_by_the_root_of_what_is_too_much(share, kl, kept):
    assert shortened(share, kl, 0.01) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("scale", "share", "kl", "following"),
    [
        (1.0, 1.0, 0.01, 1.0),
        (1.0, 0.5, 0.01, 0.5),  # what was kept made the target: begin there
        (0.5, 1.0, 0.0064, 0.625),  # sqrt(0.01 / 0.0064) = 1.25
        (0.8, 0.5, 0.04, 0.2),
        (0.2, 1.0, 0.0, 0.4),  # doubled at most
        (0.2, 1.0, 1e-9, 0.4),
        (0.2, 1.0, 9.0, 0.1),  # halved at most
        (1.0, 1.0, 1e-6, 1.0),  # the learning rate is the highest
        (1e-4, 1e-4, 9.0, 1e-4),  # so that it can come back
    ],
)
def test_the_next_step_begins_with_what_would_have_made_the_target(scale, share, kl, following):
    assert next_scale(scale, share, kl, 0.01) == pytest.approx(following)


@pytest.mark.parametrize("size", [0.02, 1.0, 50.0])
def test_steps_settle_at_the_target_whatever_the_models_size(size):
    """A model whose KL is `size` x (share of the learning rate)^2, as that of a small step is."""
    scale, kls, shortenings = 1.0, [], 0
    for _ in range(12):
        share = 1.0
        while too_far(kl := size * (scale * share) ** 2, 0.01):
            share, shortenings = shortened(share, kl, 0.01), shortenings + 1
        kls.append(kl)
        scale = next_scale(scale, share, kl, 0.01)
    assert kls[-1] == pytest.approx(min(0.01, size), rel=1e-6)
    assert shortenings <= 2 and max(kls) <= 0.015


def test_a_bonus_grows_below_the_floor_and_fades_above_it():
    below, above = (lambda bonus: next_bonus(bonus, 0.05, 0.1)), (lambda bonus: next_bonus(bonus, 0.1, 0.1))
    assert below(0.0) == 0.001
    assert below(0.001) == pytest.approx(0.00125)
    assert below(0.9) == 1.0 == below(1.0)
    assert above(0.01) == pytest.approx(0.008)
    assert above(0.0012) == 0.0 == above(0.0)


def test_ten_steps_below_the_floor_make_a_bonus_nine_times_as_large():
    bonus = 0.001
    for _ in range(10):
        bonus = next_bonus(bonus, 0.0, 0.1)
    assert bonus == pytest.approx(0.001 * 1.25**10)
    assert 9 < 1.25**10 < 10


def test_the_entropy_of_samples_is_a_mean_over_tokens(make_rows):
    rows = [
        make_rows(1, completion_ids=(1, 2, 3), logprobs=(-0.5, -0.25, 0.0))[0],
        make_rows(1, completion_ids=(1,), logprobs=(-2.25,))[0],
    ]
    assert sampled_entropy(rows) == 0.75
    assert sampled_entropy([]) == 0.0


def along(model):
    """How much of the way from a model's start to three times as far B has gone; and the measure of its KL."""
    start = lora.snapshot(model)
    lora.restore(model, {name: 3 * tensor for name, tensor in start.items()})
    name = next(name for name in start if "lora_B" in name)

    def went():
        return float((lora.snapshot(model)[name] / start[name]).mean() - 1) / 2

    return start, went


def test_a_step_is_shortened_on_the_line_that_it_took(model, moved):
    start, went = along(moved(model))
    end = lora.snapshot(model)
    share, kl = hold_back(model, start, lambda: 0.16 * went() ** 2, 0.01)
    assert (share, kl) == pytest.approx((0.25, 0.01), rel=1e-4)
    for name, tensor in lora.snapshot(model).items():
        assert torch.allclose(tensor, start[name] + 0.25 * (end[name] - start[name]))


def test_a_step_within_its_target_is_left_as_it_is(model, moved):
    start, _ = along(moved(model))
    end = lora.snapshot(model)
    assert hold_back(model, start, lambda: 0.015, 0.01) == (1.0, 0.015)
    assert all(torch.equal(tensor, end[name]) for name, tensor in lora.snapshot(model).items())


def test_shortening_ends_and_what_is_left_is_taken(model, moved):
    start, _ = along(moved(model))
    asked = iter(range(100))
    share, kl = hold_back(model, start, lambda: next(asked) * 0 + 5.0, 1e-6)
    assert (share, kl) == (pytest.approx(1e-4), 5.0)
    assert next(asked) == 1 + pace.SHORTENINGS


def test_of_a_step_whose_kl_is_no_number_nothing_is_kept(model, moved):
    start, _ = along(moved(model))
    share, kl = hold_back(model, start, lambda: math.nan, 0.01)
    assert share == 0.0 and math.isnan(kl)
    assert all(torch.equal(tensor, start[name]) for name, tensor in lora.snapshot(model).items())
