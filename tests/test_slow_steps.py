"""Runs with several epochs, a target KL and an entropy floor: versions, lines, and resuming."""

import dspy
import pytest

from fst_optimizer.failpoints import inject, raising
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from helpers.toy import answer, assert_same_run, metric, run_toy

pytestmark = pytest.mark.slow  # whole runs

STEPS = {"method": "rl", "train.epochs": 2, "train.target_kl": 1e-4, "train.entropy_floor": 50.0}
"""Every step is too long, and has too little entropy."""


def steps_of(run_dir):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "step"]


def test_a_batch_is_one_step_and_one_version_however_many_epochs(scripted, tmp_path):
    values = {"method": "rl"}
    once = run_toy(tmp_path / "once", scripted(answer), values=values)
    twice = run_toy(tmp_path / "twice", scripted(answer), values=values | {"train.epochs": 2})
    assert (once["steps"], once["rollouts"]) == (twice["steps"], twice["rollouts"])
    one, two = steps_of(tmp_path / "once"), steps_of(tmp_path / "twice")
    assert [line["epochs"] for line in one] == [1] * 4 and [line["epochs"] for line in two] == [2] * 4
    assert [line["policy_version"] for line in one] == [line["policy_version"] for line in two] == [1, 2, 3, 4]
    # The second epoch is off-policy, and says so.
    first, second = one[0], two[0]
    assert first["ratio_max"] != second["ratio_max"]
    assert (first["kl_to_last"], first["entropy_coef"]) == (None, 0.0)


def test_a_line_tells_the_kl_of_its_step_and_the_bonus_in_force(scripted, tmp_path):
    run_toy(tmp_path / "run", scripted(answer), values=STEPS)
    lines = steps_of(tmp_path / "run")
    assert all(0 < line["kl_to_last"] <= 1.5e-4 for line in lines)
    assert all(line["lr"] < 0.01 for line in lines)
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.001 * 1.25**n for n in range(4)])


@pytest.mark.parametrize("after", [1, 5])
def test_a_run_that_was_stopped_between_two_epochs_resumes_to_the_same(scripted, tmp_path, after):
    run_toy(tmp_path / "whole", scripted(answer), values=STEPS)
    with inject("trainer.step", raising(KeyboardInterrupt()), after=after), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer), values=STEPS)
    kept = read_json(tmp_path / "run" / read_json(tmp_path / "run" / "state.json")["checkpoint"] / "trainer.json")
    assert kept["updates"] == after // 2
    assert (kept["lr_scale"] < 1 and kept["bonus"] > 0) is (kept["updates"] > 0)
    run_toy(tmp_path / "run", scripted(answer), values=STEPS, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def half_flat(example, prediction, trace=None, pred_name=None, pred_trace=None):
    """Some examples are right whatever the answer."""
    if example.question in ("q0", "q1", "q2"):
        return dspy.Prediction(score=1.0, feedback="Right.")
    return metric(example, prediction, trace, pred_name, pred_trace)


def test_flat_groups_count_as_flat_and_change_nothing_above_the_floor(scripted, tmp_path):
    plain, floored = tmp_path / "plain", tmp_path / "floored"
    run_toy(plain, scripted(answer), metric=half_flat, values={"method": "rl"})
    run_toy(floored, scripted(answer), metric=half_flat, values={"method": "rl", "train.entropy_floor": 1e-9})
    assert any(line["flat_groups"] for line in steps_of(plain))
    assert_same_run(plain, floored)
