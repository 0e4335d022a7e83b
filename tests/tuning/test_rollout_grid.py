from types import SimpleNamespace

import pytest
from hypothesis import given, strategies

from fst_optimizer.config.run import FSTConfig, preset
from fst_optimizer.errors import StopRun
from fst_optimizer.tuning.grid import grid_points, passed, planned_rollouts
from fst_optimizer.tuning.watch import Watcher


def test_the_grid_is_even_and_ends_at_the_cap():
    assert grid_points(900, 3) == (300, 600, 900)
    assert grid_points(100, 9) == (11, 22, 33, 44, 55, 66, 77, 88, 100)
    assert len(grid_points(2304)) == 9


@given(strategies.integers(9, 10**6), strategies.integers(0, 10**6))
def test_a_point_is_passed_when_no_later_evaluation_can_count(cap, rollouts):
    points = grid_points(cap)
    count = passed(points, rollouts)
    assert all(point < rollouts for point in points[:count])
    assert all(point >= rollouts for point in points[count:])


def test_what_a_preset_spends():
    # Four cycles of at most 192 fast rollouts, and 6 steps of 8 examples with 8 rollouts each.
    assert planned_rollouts(preset("light")) == 4 * (192 + 6 * 8 * 8) == 2304
    values = {"method": "rl", "budget.max_cycles": 2}
    assert planned_rollouts(FSTConfig().with_values(values)) == 2 * 384
    assert planned_rollouts(FSTConfig().with_values({**values, "method": "gepa"})) == 2 * 192
    assert planned_rollouts(FSTConfig().with_values({"budget.max_rollouts": 77})) == 77


class Heard:
    """A listener that gives up at one step."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.steps = []
        self.rollouts = []

    def told(self, rollouts, score):
        self.rollouts.append((rollouts, score))

    def reached(self, step, score, scores):
        self.steps.append((step, score, dict(scores)))
        return step == self.stop_at


def line(kind, rollouts, **fields):
    return {"kind": kind, "rollouts": {"fast": 0, "slow": rollouts, "eval": 9, "reused": 0}, **fields}


def evaluation(watcher, rollouts, scores, candidate="a", version=0):
    for example, score in scores.items():
        watcher({"kind": "progress", "phase": "eval", "done": 1, "total": 2, "example": example, "score": score})
    mean = sum(scores.values()) / len(scores) if scores else 0.5
    watcher(line("eval", rollouts, score=mean, kl_to_base=0.0, candidate=candidate, policy_version=version))


def test_a_point_gets_the_last_score_at_or_before_it():
    heard = Heard()
    watcher = Watcher((100, 200, 300), heard)
    evaluation(watcher, 0, {"x": 0.0, "y": 0.2})
    watcher(line("step", 90))
    evaluation(watcher, 100, {"x": 0.4, "y": 0.4})  # exactly at the point: counts
    assert heard.steps == []
    watcher(line("step", 101))
    evaluation(watcher, 250, {"x": 1.0, "y": 0.8})  # after the second point: does not count there
    watcher(line("step", 301))
    assert heard.steps == [
        (1, 0.4, {"x": 0.4, "y": 0.4}),
        (2, 0.4, {"x": 0.4, "y": 0.4}),
        (3, 0.9, {"x": 1.0, "y": 0.8}),
    ]


def test_trials_of_other_rhythms_are_compared_at_the_same_cost():
    steps = {}
    for every in (30, 70):
        heard = Heard()
        watcher = Watcher((100, 200), heard)
        for rollouts in range(0, 300, every):
            evaluation(watcher, rollouts, {"x": rollouts / 300}, version=rollouts)
        steps[every] = [round(300 * score) for _, score, _ in heard.steps]
    assert steps == {30: [90, 180], 70: [70, 140]}


def test_the_better_of_two_candidates_at_one_cost_counts():
    heard = Heard()
    watcher = Watcher((10,), heard)
    evaluation(watcher, 5, {"x": 0.7}, "a")
    evaluation(watcher, 5, {"x": 0.3}, "b")
    watcher(line("step", 11))
    assert heard.steps == [(1, 0.7, {"x": 0.7})]


def test_a_pair_that_is_not_scored_again_keeps_its_scores_by_example():
    heard = Heard()
    watcher = Watcher((10, 20), heard)
    evaluation(watcher, 5, {"x": 0.5}, "a", 3)
    watcher(line("eval", 15, score=0.5, kl_to_base=0.0, candidate="a", policy_version=3))
    watcher(line("step", 21))
    assert [scores for _, _, scores in heard.steps] == [{"x": 0.5}, {"x": 0.5}]


def test_giving_up_stops_the_run_and_counts_the_step_that_was_paid_for():
    heard = Heard(stop_at=2)
    watcher = Watcher((100, 200, 300), heard)
    evaluation(watcher, 0, {"x": 0.1})
    watcher(line("step", 150))
    with pytest.raises(StopRun):
        watcher(line("step", 230))
    assert watcher.pruned_at == 2
    assert heard.rollouts[-1] == (230, 0.1)


def test_the_last_score_of_a_run_that_ended_stands_at_every_point_that_is_left():
    heard = Heard(stop_at=3)
    watcher = Watcher((100, 200, 300), heard)
    evaluation(watcher, 0, {"x": 0.1})
    evaluation(watcher, 180, {"x": 0.6})
    watcher.ended()
    assert [(step, score) for step, score, _ in heard.steps] == [(1, 0.1), (2, 0.6), (3, 0.6)]
    assert watcher.pruned_at is None


def test_other_events_are_nobodys_business():
    watcher = Watcher((1,), Heard())
    watcher({"kind": "waiting", "seconds": 3.0, "text": "loading"})
    watcher({"kind": "progress", "phase": "slow", "done": 1, "total": 2})
    assert watcher.curve == [] and SimpleNamespace(**vars(watcher)).steps == 0
