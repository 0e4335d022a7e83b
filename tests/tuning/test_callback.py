import pytest
from hypothesis import given, strategies

from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import StopRun
from fst_optimizer.tuning.callback import PruningCallback
from fst_optimizer.tuning.pruning import SCORES, grid_points, passed
from fst_optimizer.tuning.request import planned_rollouts


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


class FakeTrial:
    """An Optuna trial that is pruned at one step."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.reported = []
        self.user_attrs = {}

    @property
    def steps(self):
        """(step, score, scores by example)"""
        return [(step, score, dict(self.user_attrs[SCORES][str(step)])) for step, score in self.reported]

    def set_user_attr(self, name, value):
        self.user_attrs[name] = value

    def report(self, score, step):
        self.reported.append((step, score))

    def should_prune(self):
        return self.reported[-1][0] == self.stop_at


def watching(points, trial):
    return PruningCallback(trial, points, keeps_examples=True)


def line(kind, rollouts, **fields):
    return {"kind": kind, "rollouts": {"fast": 0, "slow": rollouts, "eval": 9, "reused": 0}, **fields}


def evaluation(callback, rollouts, scores, candidate="a", version=0):
    for example, score in scores.items():
        callback({"kind": "progress", "phase": "eval", "done": 1, "total": 2, "example": example, "score": score})
    mean = sum(scores.values()) / len(scores) if scores else 0.5
    callback(line("eval", rollouts, score=mean, kl_to_base=0.0, candidate=candidate, policy_version=version))


def test_a_point_gets_the_last_score_at_or_before_it():
    trial = FakeTrial()
    callback = watching((100, 200, 300), trial)
    evaluation(callback, 0, {"x": 0.0, "y": 0.2})
    callback(line("step", 90))
    evaluation(callback, 100, {"x": 0.4, "y": 0.4})  # exactly at the point: counts
    assert trial.steps == []
    callback(line("step", 101))
    evaluation(callback, 250, {"x": 1.0, "y": 0.8})  # after the second point: does not count there
    callback(line("step", 301))
    assert trial.steps == [
        (1, 0.4, {"x": 0.4, "y": 0.4}),
        (2, 0.4, {"x": 0.4, "y": 0.4}),
        (3, 0.9, {"x": 1.0, "y": 0.8}),
    ]


def test_trials_of_other_rhythms_are_compared_at_the_same_cost():
    steps = {}
    for every in (30, 70):
        trial = FakeTrial()
        callback = watching((100, 200), trial)
        for rollouts in range(0, 300, every):
            evaluation(callback, rollouts, {"x": rollouts / 300}, version=rollouts)
        steps[every] = [round(300 * score) for _, score, _ in trial.steps]
    assert steps == {30: [90, 180], 70: [70, 140]}


def test_the_better_of_two_candidates_at_one_cost_counts():
    trial = FakeTrial()
    callback = watching((10,), trial)
    evaluation(callback, 5, {"x": 0.7}, "a")
    evaluation(callback, 5, {"x": 0.3}, "b")
    callback(line("step", 11))
    assert trial.steps == [(1, 0.7, {"x": 0.7})]


def test_a_pair_that_is_not_scored_again_keeps_its_scores_by_example():
    trial = FakeTrial()
    callback = watching((10, 20), trial)
    evaluation(callback, 5, {"x": 0.5}, "a", 3)
    callback(line("eval", 15, score=0.5, kl_to_base=0.0, candidate="a", policy_version=3))
    callback(line("step", 21))
    assert [scores for _, _, scores in trial.steps] == [{"x": 0.5}, {"x": 0.5}]


def test_pruning_stops_the_run_and_counts_the_step_that_led_beyond_the_point():
    trial = FakeTrial(stop_at=2)
    callback = watching((100, 200, 300), trial)
    evaluation(callback, 0, {"x": 0.1})
    callback(line("step", 150))
    with pytest.raises(StopRun):
        callback(line("step", 230))
    assert callback.pruned_at == 2
    assert (trial.user_attrs["rollouts"], trial.user_attrs["score"]) == (230, 0.1)


def test_the_last_score_of_a_run_that_ended_stands_at_every_point_that_is_left():
    trial = FakeTrial(stop_at=3)
    callback = watching((100, 200, 300), trial)
    evaluation(callback, 0, {"x": 0.1})
    evaluation(callback, 180, {"x": 0.6})
    callback.ended()
    assert [(step, score) for step, score, _ in trial.steps] == [(1, 0.1), (2, 0.6), (3, 0.6)]
    assert callback.pruned_at is None


def test_other_events_are_ignored():
    callback = watching((1,), FakeTrial())
    callback({"kind": "waiting", "seconds": 3.0, "text": "loading"})
    callback({"kind": "progress", "phase": "slow", "done": 1, "total": 2})
    assert callback.steps == 0 and callback.trial.user_attrs == {}
