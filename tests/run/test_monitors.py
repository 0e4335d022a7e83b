"""Monitors: what each sees, when it speaks, and when it does so again."""

import pytest

from fst_optimizer.config.monitors import MonitorsConfig
from fst_optimizer.rollout.credit import Credit
from fst_optimizer.run.monitors import Watch, after_eval, after_step
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.train.report import StepReport
from fst_optimizer.types import Outcome, Rollout

CONFIG = MonitorsConfig(steps=2, flat_batches=3, falling_evals=2, kl_max=0.5)


def numbers(reward_mean=0.5, flat=False, updated=True, entropy=0.3, failed_share=0.0):
    """Ten rollouts of a step, their credit and the trainer's report."""
    outcomes = [Outcome.TRUNCATED if index < 10 * failed_share else Outcome.OK for index in range(10)]
    rollouts = [Rollout("c", "train-0", index, 0, outcome, 0.5) for index, outcome in enumerate(outcomes)]
    return (
        rollouts,
        Credit((), reward_mean, groups=2, flat_groups=2 if flat else 1),
        StepReport(updated, entropy=entropy),
    )


def steps(*changes, config=CONFIG, watch=None):
    """The monitors that spoke at each step."""
    watch, spoke = watch or Watch(), []
    for change in changes:
        watch, alarms = after_step(config, watch, *numbers(**change))
        spoke.append([alarm.monitor for alarm in alarms])
    return watch, spoke


def evals(*rounds, config=CONFIG):
    """The monitors that spoke at each evaluation; a round is (reward before it, score, KL)."""
    watch, spoke = Watch(), []
    for reward, score, kl in rounds:
        watch, _ = after_step(config, watch, *numbers(reward_mean=reward))
        watch, alarms = after_eval(config, watch, ValidationScore(0, score, kl, 0, 4), best=1.0, best_before=0.5)
        spoke.append([alarm.monitor for alarm in alarms])
    return watch, spoke


@pytest.mark.parametrize(
    ("monitor", "bad", "needed"),
    [
        ("flat", {"flat": True, "updated": False}, 3),
        ("entropy", {"entropy": 0.001}, 2),
        ("format", {"failed_share": 0.6}, 2),
    ],
)
def test_a_step_guard_speaks_once_when_it_has_seen_enough_in_a_row(monitor, bad, needed):
    assert steps(*[bad] * (needed + 2))[1] == [*[[]] * (needed - 1), [monitor], [], []]
    interrupted = [bad] * (needed - 1) + [{}] + [bad] * (needed - 1)
    assert not any(steps(*interrupted)[1])


def test_a_guard_speaks_again_after_all_was_well():
    bad = {"failed_share": 0.6}
    assert steps(bad, bad, {}, bad, bad)[1] == [[], ["format"], [], [], ["format"]]


def test_little_entropy_is_no_fault_in_a_policy_that_is_right():
    assert not any(steps(*[{"entropy": 0.001, "reward_mean": 0.95}] * 4)[1])


def test_a_step_without_an_update_says_nothing_of_entropy():
    low, flat = {"entropy": 0.001}, {"updated": False, "entropy": 0.0}
    assert steps(low, flat, low)[1] == [[], [], ["entropy"]]


def test_a_guard_that_is_off_sees_nothing_and_can_be_turned_on():
    off = MonitorsConfig(steps=2, format="off")
    bad = {"failed_share": 0.6}
    watch, spoke = steps(bad, bad, bad, config=off)
    assert not any(spoke)
    assert steps(bad, watch=watch)[1] == [["format"]]


def test_the_policy_may_not_be_far_from_its_base():
    assert evals((0.1, 0.5, 0.4), (0.1, 0.5, 0.6), (0.1, 0.5, 0.7))[1] == [[], ["kl"], []]


def test_a_validation_score_that_falls_while_the_reward_rises_is_told():
    assert evals((0.1, 0.5, 0), (0.2, 0.4, 0), (0.3, 0.3, 0))[1] == [[], [], ["falling"]]
    assert not any(evals((0.1, 0.5, 0), (0.2, 0.4, 0), (0.3, 0.4, 0))[1])  # it stayed
    assert not any(evals((0.1, 0.5, 0), (0.2, 0.4, 0), (0.1, 0.3, 0))[1])  # so did the reward


def test_cycles_without_a_better_score_are_counted_whatever_phase_found_it():
    watch, stale = Watch(), []
    for best in (0.5, 0.5, 0.7, 0.7, 0.7):
        watch, _ = after_eval(CONFIG, watch, ValidationScore(0, 0.1, 0.0, 0, 4), best=best, best_before=0.5)
        stale.append(watch.stale)
    assert stale == [1, 2, 0, 1, 2]


def test_flat_batches_under_a_penalty_say_what_was_not_learned():
    assert "nothing was learned:" in steps(*[{"flat": True, "updated": False}] * 3)[0].alarms[0]
    watch, spoke = steps(*[{"flat": True, "updated": True}] * 3)
    assert spoke[-1] == ["flat"] and "rewards taught nothing: raise rollout.temperature" in watch.alarms[0]


def test_batches_that_are_flat_because_all_calls_are_greedy_say_so():
    rollouts, _, report = numbers(updated=False)
    credited = Credit((), 0.5, groups=2, flat_groups=2, greedy={"answer": 20})
    (alarm,) = after_step(CONFIG.changed(flat_batches=1), Watch(), rollouts, credited, report)[1]
    assert "calls at temperature 0 (of 'answer') are not trained on" in alarm.text
    assert "raise rollout.temperature" not in alarm.text


def test_too_little_entropy_names_the_bonus():
    assert "set train.entropy_coef" in steps(*[{"entropy": 0.001}] * 2)[0].alarms[0]


def test_all_that_was_said_is_kept():
    watch, _ = steps(*[{"failed_share": 0.6}] * 2)
    assert watch.alarms[0].startswith("format: more than 50% of the rollouts could not be parsed")
    assert Watch.from_json(watch.to_json()) == watch


@pytest.mark.parametrize(
    ("outcome", "remedy"),
    [
        (Outcome.PROGRAM_ERROR, "correct the program"),
        (Outcome.PARSE_ERROR, "policy.max_tokens"),
        (Outcome.TIMEOUT, "rollout.timeout_s"),
        (Outcome.ENGINE_ERROR, "rollout.num_threads"),
    ],
)
def test_batches_that_are_flat_because_rollouts_fail_name_the_failure(outcome, remedy):
    failed = [Rollout("c", f"train-{index}", 0, 0, outcome, 0.0, error="it broke") for index in range(6)]
    credited, report = Credit((), 0.0, groups=2, flat_groups=2), StepReport(False)
    quiet = CONFIG.changed(format="off", flat_batches=1)
    fine = [Rollout("c", "train-9", index, 0, Outcome.OK, 0.0) for index in range(7)]
    (alarm,) = after_step(quiet, Watch(), [*fine[:4], *failed], credited, report)[1]
    assert f"6 of the last 10 rollouts ended in {outcome} (the first: {outcome} on train-0: it broke)" in alarm.text
    assert remedy in alarm.text and "temperature" not in alarm.text
    (alarm,) = after_step(quiet, Watch(), [*fine, *failed], credited, report)[1]  # most of them did not fail
    assert "raise rollout.temperature" in alarm.text and str(outcome) not in alarm.text


def test_steps_in_which_nothing_parses_do_not_advise_a_reward():
    _, spoke = steps({"failed_share": 1.0}, {"failed_share": 1.0})
    assert spoke[1] == ["format"]
    watch, _ = steps({"failed_share": 1.0}, {"failed_share": 1.0})
    assert "10 of the last 10 rollouts ended in truncated" in watch.alarms[0]
    assert "parse_error_reward" not in watch.alarms[0]
