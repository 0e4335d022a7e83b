"""How a switch of the task is noticed, worked by hand; and how often there is none."""

import random

import pytest

from fst_optimizer.run.switches import ALARM, Level, Lookout, after_feedback, after_scores, fell


def test_the_first_step_sets_the_level():
    seen, switch = after_scores(Lookout(), [1.0, 0.0, 1.0, 0.0])
    assert (seen.level, switch) == (Level(0.5, pytest.approx(1 / 3), 4), False)


def test_drops_are_summed_in_standard_errors_less_the_allowance():
    before = Lookout(Level(0.8, 0.04, 8, steps=30), said=("Sort.",))
    # Pooled variance (7 * .04 + 3 * .04) / 10 = .04, so the error is sqrt(.04 * (1/8 + 1/4)) = .122; 4.082 - 0.5.
    sample = [0.3 - 0.03**0.5, 0.3 - 0.03**0.5, 0.3 + 0.03**0.5, 0.3 + 0.03**0.5]
    seen, switch = after_scores(before, sample)
    assert not switch and seen.said == ("Sort.",)
    assert seen.level.drop == pytest.approx(0.5 / (0.04 * 0.375) ** 0.5 - 0.5)
    assert seen.level.mean == pytest.approx(0.8 + 0.1 * (0.3 - 0.8))  # a tenth of the way, after many steps
    assert (seen.level.variance, seen.level.size, seen.level.steps) == (pytest.approx(0.04), 12, 31)
    again, switch = after_scores(seen, sample)
    assert switch and again == Lookout(Level(pytest.approx(0.3), pytest.approx(0.04), 4))  # what was said is forgotten


def test_scores_above_the_level_are_no_switch_and_take_drops_back():
    seen, switch = after_scores(Lookout(Level(0.2, 0.0, 8, drop=ALARM - 1)), [1.0] * 8)
    # 8 scores that are all equal are not believed to be without noise: a spread of .1, an error of .05.
    assert not switch and seen.level.drop == 0.0


def test_a_few_equal_scores_are_not_taken_for_certainty():
    seen, switch = after_scores(Lookout(Level(1.0, 0.0, 8)), [0.9] * 8)
    assert not switch and seen.level.drop == pytest.approx(0.1 / 0.05 - 0.5)


def test_without_scores_nothing_is_seen():
    assert after_scores(Lookout(said=("Sort.",)), []) == (Lookout(said=("Sort.",)), False)


def test_the_leader_fell_where_its_drop_is_beyond_luck():
    # A drop of .5 over an error of sqrt(.01 * 2 / 8) = .05 is 10; one of .2 is 4.
    assert fell([0.9] * 8, [0.4] * 8) and not fell([0.9] * 8, [0.7] * 8)
    assert not fell([0.4] * 8, [0.9] * 8)
    assert not fell([], [0.1] * 8) and not fell([1.0] * 8, [0.0])


def test_a_sentence_that_recurs_and_is_new_is_a_switch():
    seen, switch = after_feedback(Lookout(), [["Wrong.", "Sort them."], ["Wrong.", "Sort them."], ["Wrong."]])
    assert (seen.said, switch) == (("Wrong.", "Sort them."), False)
    assert after_feedback(seen, [["Wrong."], ["Wrong."]]) == (seen, False)
    # Said once, it is about the example.
    assert after_feedback(seen, [["Wrong.", "It was 'abc'."], ["Wrong.", "It was 'cba'."]]) == (seen, False)
    assert after_feedback(seen, []) == (seen, False)
    level = Lookout(Level(0.5, 0.1, 8), seen.said)
    new, switch = after_feedback(level, [["Wrong.", "Drop one."], ["Wrong.", "Drop one."]])
    assert switch and new == Lookout(said=("Wrong.", "Drop one."))


def alarms(seed, steps, level, spread, size=8, then=None, at=0):
    """The steps at which a switch is noticed, in scores around a level."""
    draw, seen, found = random.Random(seed), Lookout(), []
    for step in range(steps):
        mean = level if then is None or step < at else then
        scores = [min(1.0, max(0.0, draw.gauss(mean, spread))) for _ in range(size)]
        seen, switch = after_scores(seen, scores)
        found += [step] if switch else []
    return found


@pytest.mark.parametrize(("level", "spread"), [(0.5, 0.3), (0.9, 0.2), (0.2, 0.3)])
def test_noise_around_one_level_is_hardly_ever_a_switch(level, spread):
    found = [alarms(seed, 250, level, spread) for seed in range(40)]
    assert sum(map(len, found)) <= 3  # in 10,000 steps


@pytest.mark.parametrize(("level", "spread", "then"), [(0.5, 0.3, 0.2), (0.9, 0.2, 0.4)])
def test_a_drop_is_noticed_within_a_few_steps(level, spread, then):
    found = [alarms(seed, 60, level, spread, then=then, at=40) for seed in range(40)]
    delays = [one[0] - 40 for one in found if one]
    assert len(delays) == 40 and min(delays) >= 0 and sum(delays) / 40 <= 4


def test_two_rounds_of_the_same_quality_are_not_taken_for_a_fall_though_the_leader_led_by_luck():
    draw, falls = random.Random(0), 0
    for _ in range(2000):
        tries = [[float(draw.random() < 0.6) for _ in range(16)] for _ in range(8)]
        falls += fell(max(tries, key=sum), [float(draw.random() < 0.6) for _ in range(16)])
    assert falls <= 10


def test_what_was_seen_survives_json():
    seen = Lookout(Level(0.5, 0.1, 8.0, 3, 1.5), ("Sort them.",))
    assert Lookout.from_json(seen.to_json()) == seen
