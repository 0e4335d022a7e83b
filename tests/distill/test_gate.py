from dataclasses import replace

import pytest

from fst_optimizer import UserError
from fst_optimizer.config.distill import DistillConfig
from fst_optimizer.distill.gate import Measured, needed_score, refusal

GOOD = Measured(before=0.2, after=0.66, teacher=0.7, entropy=0.3, teacher_entropy=0.4)


def test_a_share_of_the_gain_is_asked_for():
    # From .2 to .7: nine tenths of .5 are .45.
    assert needed_score(0.2, 0.7, 0.9) == pytest.approx(0.65)
    assert needed_score(0.2, 0.7, 1.0) == pytest.approx(0.7)
    # A prompt that gains nothing, or harms: what was there before is enough.
    assert needed_score(0.5, 0.5, 0.9) == needed_score(0.5, 0.3, 0.9) == 0.5


def test_what_keeps_the_gain_and_the_entropy_is_let_through():
    config = DistillConfig()
    assert refusal(GOOD, config) == ""
    assert refusal(replace(GOOD, after=0.65), config) == ""
    assert refusal(replace(GOOD, entropy=0.2), config) == ""  # half of .4
    assert refusal(replace(GOOD, entropy=0.0, teacher_entropy=0.0), config) == ""
    assert refusal(replace(GOOD, after=0.21), DistillConfig(keep_gain=0.01)) == ""
    assert refusal(replace(GOOD, entropy=0.0), DistillConfig(min_entropy=0)) == ""


def test_a_refusal_names_both_scores_and_what_was_asked_for():
    assert refusal(replace(GOOD, after=0.64), DistillConfig()) == (
        "without the long prompt the program scores 0.6400 on the validation set (0.2000 before), with it 0.7000; "
        "distill.keep_gain=0.9 asks for 0.6500"
    )
    assert refusal(replace(GOOD, entropy=0.1), DistillConfig()) == (
        "without the long prompt the program scores 0.6600 on the validation set, with it 0.7000, but the policy's "
        "entropy is 0.1000 nats a token and its teacher's 0.4000; distill.min_entropy=0.5 asks for 0.2000"
    )


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"keep_gain": 0.0}, "distill.keep_gain is 0.0: give a share above 0 and at most 1"),
        ({"keep_gain": 1.5}, "distill.keep_gain is 1.5: give a share above 0 and at most 1"),
        ({"min_entropy": -1.0}, "distill.min_entropy is -1.0: give a share of at least 0"),
        ({"full_vocabulary": 1}, "distill.full_vocabulary is 1: give true or false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, error):
    with pytest.raises(UserError) as caught:
        DistillConfig(**values)
    assert str(caught.value) == error
