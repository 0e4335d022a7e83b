import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.rollout.credit import (
    FLAT_ABSOLUTE,
    FLAT_RELATIVE,
    advantages,
    baselines,
    credit,
    is_flat,
    reward,
    teaches_nothing,
)
from fst_optimizer.types import Call, Group, Outcome, Rollout

CONFIG = FSTConfig()
NO_EPS = CONFIG.with_values({"train.advantage_eps": 1e-300})
REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=16)


def call(*completion, **settings):
    fields = {"predictor": "answer", "prompt_ids": (1, 2), "temperature": 1.0, "policy_version": 0}
    return Call(
        **{**fields, **settings}, completion_ids=completion, logprobs=(-1.0,) * len(completion), finish_reason="stop"
    )


ONE_CALL = (call(5),)


def rollout(score, *, outcome=Outcome.OK, calls=ONE_CALL, index=0, example="train-0"):
    return Rollout("c", example, index, 0, outcome, score, tuple(calls))


def group(*rollouts, example="train-0"):
    return Group(example, rollouts)


def test_advantages_are_distances_from_the_mean_in_standard_deviations():
    # mean 0.5, population deviation 0.5
    assert advantages([1, 0, 1, 0], eps=0.0) == (1.0, -1.0, 1.0, -1.0)
    # mean 2, deviation sqrt((4 + 1 + 1 + 4) / 4) = 1.5811
    assert advantages([0, 1, 3, 4], eps=0.0) == pytest.approx((-1.26491, -0.63246, 0.63246, 1.26491), abs=1e-5)


def test_eps_is_added_to_the_deviation():
    assert advantages([1, 0], eps=0.5) == (0.5, -0.5)


@pytest.mark.parametrize("rewards", [[], [0.3], [1.0, 1.0, 1.0], [0.0] * 8])
def test_equal_rewards_carry_no_signal(rewards):
    assert advantages(rewards) == (0.0,) * len(rewards)


def test_rewards_that_differ_by_rounding_alone_are_flat():
    assert 0.1 + 0.2 != 0.3
    assert advantages([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]) == (0.0,) * 4
    assert advantages([0.1 + 0.2 - 0.3, 0.0]) == (0.0, 0.0)
    found = credit([group(rollout(0.1 + 0.2), rollout(0.3))], CONFIG)
    assert (found.rows, found.flat_groups) == ((), 1)


@given(st.floats(-1e6, 1e6), st.lists(st.floats(-0.49, 0.49), min_size=1, max_size=8))
def test_what_is_within_the_tolerance_is_flat(value, errors):
    near = [value * (1 + error * FLAT_RELATIVE) + error * FLAT_ABSOLUTE for error in errors]
    assert is_flat(near)
    assert advantages(near) == (0.0,) * len(near)


@given(st.floats(-1e6, 1e6), st.sampled_from([-1, 1]), st.lists(st.floats(0, 1), max_size=6))
def test_what_is_beyond_the_tolerance_is_a_signal(value, sign, between):
    other = value + sign * (3 * FLAT_RELATIVE * abs(value) + 3 * FLAT_ABSOLUTE)
    rewards = [value, other, *(value + share * (other - value) for share in between)]
    assert not is_flat(rewards)
    lower, higher = sorted(zip(rewards, advantages(rewards), strict=True))[:: len(rewards) - 1]
    assert lower[1] < 0 < higher[1]


def test_without_scaling_advantages_are_distances_from_the_mean():
    # mean .75: a group whose answers are nearly all right keeps its small distances
    assert advantages([1, 1, 1, 0], scale=False) == (0.25, 0.25, 0.25, -0.75)
    assert advantages([0.5, 0.25], eps=7.0, scale=False) == (0.125, -0.125)
    assert advantages([0.1 + 0.2, 0.3], scale=False) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        ({}, True),
        ({"train.loss": "grpo"}, True),
        ({"train.loss": "dr_grpo"}, False),
        ({"train.loss": "dr_grpo", "train.scale_advantages": True}, True),
        ({"train.scale_advantages": False}, False),
        ({"train.credit": "predictor", "train.loss": "dr_grpo"}, False),
    ],
)
def test_dr_grpo_alone_does_not_divide_by_the_groups_spread_unless_told(values, scaled):
    found = credit([group(rollout(1.0), rollout(0.5))], NO_EPS.with_values(values))
    assert [row.advantage for row in found.rows] == ([1.0, -1.0] if scaled else [0.25, -0.25])


@given(REWARDS)
def test_advantages_sum_to_zero(rewards):
    assert math.fsum(advantages(rewards)) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=16), st.integers(1, 20), st.integers(-100, 100))
def test_advantages_do_not_depend_on_the_metrics_scale_or_origin(rewards, scale, shift):
    moved = [scale * value + shift for value in rewards]
    assert advantages(moved, eps=1e-12) == pytest.approx(advantages(rewards, eps=1e-12), abs=1e-6)


@given(REWARDS)
def test_a_higher_reward_never_has_the_lower_advantage(rewards):
    ordered = sorted(zip(rewards, advantages(rewards), strict=True))
    assert all(low[1] <= high[1] for low, high in pairwise(ordered))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=16))
def test_advantages_have_mean_square_one_unless_flat(rewards):
    square = sum(value**2 for value in advantages(rewards, eps=1e-12)) / len(rewards)
    assert square == pytest.approx(1.0 if len(set(rewards)) > 1 else 0.0, abs=1e-6)


def test_rows_name_their_group_and_flat_groups_leave_a_gap():
    one, flat, two = (
        group(rollout(1.0, calls=[call(5), call(6)]), rollout(0.0)),
        group(rollout(1.0), rollout(1.0), example="train-1"),
        group(rollout(0.0), rollout(1.0), rollout(0.5, outcome=Outcome.ENGINE_ERROR), example="train-2"),
    )
    assert [(row.group, row.rollout) for row in credit([one, flat, two], CONFIG).rows] == [
        *[(0, 0), (0, 0), (0, 1)],
        *[(2, 2), (2, 3)],
    ]


def test_every_call_of_a_rollout_gets_the_rollouts_advantage():
    found = credit([group(rollout(1.0, calls=[call(5), call(6, 7)]), rollout(0.0, calls=[call(8)]))], NO_EPS)
    assert [(row.advantage, row.rollout, row.call.completion_ids) for row in found.rows] == [
        (1.0, 0, (5,)),
        (1.0, 0, (6, 7)),
        (-1.0, 1, (8,)),
    ]
    assert (found.reward_mean, found.groups, found.flat_groups) == (0.5, 1, 0)


def test_a_rollout_counts_once_however_many_calls_it_made():
    many = [call(5)] * 10
    found = credit([group(rollout(1.0, calls=many), rollout(0.0))], NO_EPS)
    assert {row.advantage for row in found.rows} == {1.0, -1.0}  # over calls, the mean would be 10 / 11


def test_a_rollout_without_calls_is_in_the_baseline_and_gives_no_row():
    found = credit([group(rollout(1.0, calls=[]), rollout(0.0), rollout(0.5))], NO_EPS)
    assert [row.advantage for row in found.rows] == pytest.approx([-1.2247449, 0.0])
    assert [row.rollout for row in found.rows] == [1, 2]


def test_an_empty_completion_gives_no_row():
    found = credit([group(rollout(1.0, calls=[call(), call(5)]), rollout(0.0, calls=[call()]))], CONFIG)
    assert [row.call.completion_ids for row in found.rows] == [(5,)]


def test_flat_groups_are_counted_and_dropped_but_stay_in_the_mean_reward():
    flat = group(rollout(1.0), rollout(1.0), example="train-1")
    found = credit([flat, group(rollout(1.0), rollout(0.0)), flat], CONFIG)
    assert (found.groups, found.flat_groups, len(found.rows)) == (3, 2, 2)
    assert found.reward_mean == pytest.approx(5 / 6)
    assert {row.rollout for row in found.rows} == {0, 1}


def test_rollouts_are_numbered_over_the_whole_batch():
    found = credit([group(rollout(1.0), rollout(0.0)), group(rollout(0.0), rollout(1.0))], CONFIG)
    assert [row.rollout for row in found.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (Outcome.PARSE_ERROR, "parse_error_reward"),
        (Outcome.TRUNCATED, "truncated_reward"),
        (Outcome.PROMPT_TOO_LONG, "prompt_too_long_reward"),
        (Outcome.PROGRAM_ERROR, "program_error_reward"),
        (Outcome.TIMEOUT, "timeout_reward"),
    ],
)
def test_a_failed_rollout_earns_its_outcomes_configured_reward(outcome, name):
    config = NO_EPS.with_values({f"rollout.{name}": -0.75})
    assert reward(rollout(0.0, outcome=outcome), config.rollout) == -0.75
    found = credit([group(rollout(0.25), rollout(0.0, outcome=outcome))], config)
    assert found.reward_mean == -0.25
    assert [row.advantage for row in found.rows] == [1.0, -1.0]


def test_a_good_rollout_earns_its_score_whatever_failures_earn():
    assert reward(rollout(0.7), RolloutConfig(parse_error_reward=-1.0)) == 0.7


def test_rollouts_that_the_engine_failed_are_left_out_of_baseline_and_rows():
    broken = rollout(0.0, outcome=Outcome.ENGINE_ERROR)
    found = credit([group(rollout(1.0), broken, rollout(0.5), broken)], NO_EPS)
    assert [row.advantage for row in found.rows] == [1.0, -1.0]
    assert found.reward_mean == 0.75


def test_a_group_that_the_engine_failed_whole_is_flat():
    broken = rollout(0.0, outcome=Outcome.ENGINE_ERROR)
    found = credit([group(broken, broken)], CONFIG)
    assert (found.rows, found.reward_mean, found.groups, found.flat_groups) == ((), 0.0, 1, 1)


def test_nothing_collected_gives_nothing():
    assert credit([], CONFIG).rows == ()


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=6), max_size=5))
def test_rows_cancel_out_and_flat_groups_are_those_of_one_value(scores):
    groups = [group(*(rollout(score) for score in row), example=f"train-{i}") for i, row in enumerate(scores)]
    found = credit(groups, CONFIG)
    assert found.flat_groups == sum(len(set(row)) == 1 for row in scores)
    assert math.fsum(row.advantage for row in found.rows) == pytest.approx(0, abs=1e-9)
    assert len(found.rows) == sum(len(row) for row in scores if len(set(row)) > 1)


@pytest.mark.parametrize("values", [{"train.kl_coef": 0.1}, {"train.entropy_coef": 0.1}, {"train.entropy_floor": 0.1}])
def test_flat_groups_give_rows_without_advantage_where_something_else_acts_on_them(values):
    groups = [
        group(rollout(1.0), rollout(1.0, calls=[call(5), call(6)]), example="train-1"),
        group(rollout(1.0), rollout(0.0)),
        group(rollout(0.0, outcome=Outcome.ENGINE_ERROR), rollout(0.0), example="train-2"),
    ]
    found, plain = credit(groups, CONFIG.with_values(values)), credit(groups, CONFIG)
    flat = [row for row in found.rows if row.flat]
    assert [(row.rollout, row.group, row.advantage) for row in flat] == [(0, 0, 0), (1, 0, 0), (1, 0, 0), (4, 2, 0)]
    assert [(row.advantage, row.call) for row in found.rows if not row.flat] == [
        (row.advantage, row.call) for row in plain.rows
    ]
    assert (
        (found.flat_groups, found.groups, found.reward_mean) == (plain.flat_groups, 3, plain.reward_mean) == (2, 3, 0.6)
    )


def test_of_two_predictors_the_one_whose_rewards_are_equal_is_flat():
    config = own(1.0).with_values({"train.entropy_coef": 0.1})
    found = credit([group(two(1.0, 0.0), two(1.0, 1.0))], config)
    assert [(row.call.predictor, row.flat) for row in found.rows] == [("first", True), ("second", False)] * 2
    assert by_predictor(found) == {"first": [0.0, 0.0], "second": [-1.0, 1.0]}
    assert found.flat_groups == 0


def test_a_row_of_no_advantage_in_a_group_with_signal_is_not_flat():
    found = credit([group(rollout(0.0), rollout(0.5), rollout(1.0))], CONFIG)
    assert [(row.advantage == 0, row.flat) for row in found.rows] == [(False, False), (True, False), (False, False)]


GREEDY_CALL = call(7, predictor="first", temperature=0.0)


@pytest.mark.parametrize("values", [{}, {"train.kl_coef": 0.1}])
def test_greedy_calls_are_counted_and_give_no_rows(values):
    mixed = [GREEDY_CALL, call(5, predictor="second")]
    found = credit([group(rollout(1.0, calls=mixed), rollout(0.0, calls=mixed))], NO_EPS.with_values(values))
    assert [(row.call.predictor, row.advantage) for row in found.rows] == [("second", 1.0), ("second", -1.0)]
    assert (found.greedy, found.flat_groups) == ({"first": 2}, 0)
    assert found.unlearned.startswith("calls at temperature 0 (of 'first') are not trained on")


def test_a_group_of_greedy_calls_alone_is_in_the_mean_and_teaches_nothing():
    found = credit([group(rollout(1.0, calls=[GREEDY_CALL]), rollout(0.0, calls=[GREEDY_CALL]))], CONFIG)
    assert (found.rows, found.flat_groups, found.reward_mean, found.greedy) == ((), 1, 0.5, {"first": 2})


def test_greedy_calls_of_a_predictor_that_is_not_trained_are_nothing_to_tell():
    frozen = CONFIG.with_values({"predictors": {"first": "evolve"}})
    found = credit([group(rollout(1.0, calls=[GREEDY_CALL]), rollout(0.0, calls=[call(5)]))], frozen)
    assert (found.greedy, found.unlearned) == ({}, "")


def two(first_score, second_score, **settings):
    """A rollout of two predictors with their own scores; the program's is the mean."""
    calls = [call(5, predictor="first"), call(6, predictor="second")]
    own = {"first": first_score, "second": second_score}
    return replace(rollout((first_score + second_score) / 2, calls=calls), predictor_scores=own, **settings)


def own(share, eps=1e-300):
    """Credit by predictor, with that share of a predictor's own score."""
    return CONFIG.with_values({"train.credit": "predictor", "train.own_share": share, "train.advantage_eps": eps})


def by_predictor(found):
    return {name: [row.advantage for row in found.rows if row.call.predictor == name] for name in ("first", "second")}


def test_a_predictors_own_score_alone_decides_when_its_share_is_one():
    found = credit([group(two(1.0, 0.0), two(0.0, 1.0))], own(1.0))
    # The program's scores are equal: by rollout this group would be flat.
    assert by_predictor(found) == {"first": [1.0, -1.0], "second": [-1.0, 1.0]}
    assert credit([group(two(1.0, 0.0), two(0.0, 1.0))], CONFIG).flat_groups == 1


def test_half_and_half_blends_a_predictors_score_with_the_programs():
    # Program's: .5, .5, 1, 0. First's own: 1, 0, 1, 0 -> blends .75, .25, 1, 0: mean .5, deviation sqrt(.3125/2).
    rollouts = [two(1.0, 0.0), two(0.0, 1.0), two(1.0, 1.0), two(0.0, 0.0)]
    found = credit([group(*rollouts)], own(0.5))
    std = math.sqrt((0.25**2 + 0.25**2 + 0.5**2 + 0.5**2) / 4)
    assert by_predictor(found)["first"] == pytest.approx([0.25 / std, -0.25 / std, 0.5 / std, -0.5 / std])
    assert by_predictor(found)["second"] == pytest.approx([-0.25 / std, 0.25 / std, 0.5 / std, -0.5 / std])


def test_a_predictor_whose_rewards_are_equal_is_dropped_and_the_other_stays():
    found = credit([group(two(1.0, 0.0), two(1.0, 1.0))], own(1.0))
    assert by_predictor(found) == {"first": [], "second": [-1.0, 1.0]}
    assert (found.groups, found.flat_groups) == (1, 0)


def test_a_predictors_baseline_is_over_the_rollouts_that_called_it():
    only_first = replace(rollout(0.0, calls=[call(5, predictor="first")]), predictor_scores={"first": 0.0})
    found = credit([group(two(1.0, 1.0), two(1.0, 0.0), only_first)], own(1.0))
    assert by_predictor(found)["second"] == [1.0, -1.0]
    assert len(by_predictor(found)["first"]) == 3


def test_a_failed_rollout_has_no_own_scores_and_its_reward_stands_for_them():
    failed = rollout(0.0, outcome=Outcome.PARSE_ERROR, calls=[call(5, predictor="first")])
    config = own(0.5).with_values({"rollout.parse_error_reward": -1.0})
    found = credit([group(two(1.0, 1.0), failed)], config)
    assert by_predictor(found) == {"first": [1.0, -1.0], "second": []}


def test_calls_of_a_predictor_that_is_not_trained_give_no_rows_but_count_in_the_baseline():
    found = credit([group(two(1.0, 1.0), two(0.0, 0.0))], NO_EPS.with_values({"predictors": {"first": "evolve"}}))
    assert by_predictor(found) == {"first": [], "second": [1.0, -1.0]}
    frozen = CONFIG.with_values({"predictors": {"first": "evolve", "second": "neither"}})
    nothing = credit([group(two(1.0, 1.0), two(0.0, 0.0))], frozen)
    assert (nothing.rows, nothing.flat_groups, nothing.reward_mean) == ((), 1, 0.5)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=6))
def test_without_own_share_credit_by_predictor_is_credit_by_rollout(scores):
    groups = [group(*(two(*pair) for pair in scores))]
    assert credit(groups, own(0.0, eps=CONFIG.train.advantage_eps)).rows == credit(groups, CONFIG).rows


# -- baselines of several prompts ------------------------------------------------------------------------------------


def under(candidate, score, **settings):
    return replace(rollout(score, **settings), candidate_id=candidate)


def test_baselines_by_hand():
    # Under a: mean .5. Under b: 0. The group's: .25.
    rewards, prompts = [1.0, 0.0, 0.0, 0.0], "aabb"
    assert baselines(rewards) == baselines(rewards, prompts) == (0.25,) * 4
    assert baselines(rewards, prompts, 1.0) == (0.5, 0.5, 0.0, 0.0)
    assert baselines(rewards, prompts, 0.5) == (0.375, 0.375, 0.125, 0.125)


def test_a_prompt_with_one_rollout_is_compared_with_the_group():
    assert baselines([1.0, 0.0, 0.5], "aab", 1.0) == (0.5, 0.5, 0.5)
    assert baselines([1.0, 0.0, 1.0, 0.0, 1.0], "aabbc", 1.0) == (0.5, 0.5, 0.5, 0.5, 0.6)


def test_advantages_by_prompt_by_hand():
    # By prompt: left are .5, -.5, 0, 0; the root of their mean square is sqrt(.5 / 4) = .35355.
    found = advantages([1.0, 0.0, 0.0, 0.0], 0.0, prompts="aabb", own=1.0)
    assert found == pytest.approx((math.sqrt(2), -math.sqrt(2), 0, 0))
    assert advantages([1.0, 0.0, 0.0, 0.0], prompts="aabb", own=1.0, scale=False) == (0.5, -0.5, 0, 0)
    # Half of each: left are .625, -.375, -.125, -.125; mean square (.390625 + .140625 + .03125) / 4 = .140625 = .375^2.
    assert advantages([1.0, 0.0, 0.0, 0.0], 0.0, prompts="aabb", own=0.5) == pytest.approx((5 / 3, -1, -1 / 3, -1 / 3))


def test_a_prompt_that_is_always_better_teaches_across_the_group_and_not_by_prompt():
    groups = [group(under("a", 1.0), under("a", 1.0), under("b", 0.0), under("b", 0.0))]
    across, own, mixed = (
        credit(groups, NO_EPS.with_values({"train.baseline": how})) for how in ("group", "prompt", "mixed")
    )
    assert [row.advantage for row in across.rows] == [1.0, 1.0, -1.0, -1.0]
    assert (own.rows, own.flat_groups) == ((), 1)
    assert [row.advantage for row in mixed.rows] == [1.0, 1.0, -1.0, -1.0]  # halved, and scaled up again
    plain = NO_EPS.with_values({"train.baseline": "mixed", "train.baseline_share": 0.75, "train.loss": "dr_grpo"})
    assert [row.advantage for row in credit(groups, plain).rows] == [0.125, 0.125, -0.125, -0.125]


def slow_reference(rewards, prompts, own, eps):
    """Every step written out, in the words of the settings."""
    left = []
    for one, value in zip(prompts, rewards, strict=True):
        same = [other for prompt, other in zip(prompts, rewards, strict=True) if prompt == one]
        group_mean = sum(rewards) / len(rewards)
        prompt_mean = sum(same) / len(same) if len(same) >= 2 else group_mean
        left.append(value - (own * prompt_mean + (1 - own) * group_mean))
    spread = (sum(value * value for value in left) / len(left)) ** 0.5
    return [value / (spread + eps) for value in left]


GROUPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8)), min_size=2, max_size=12)


@given(GROUPS, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_advantages_are_those_of_the_slow_reference(members, own):
    prompts, rewards = [prompt for prompt, _ in members], [value / 8 for _, value in members]
    expected = slow_reference(rewards, prompts, own, 1e-4)
    assert advantages(rewards, 1e-4, prompts=prompts, own=own) == pytest.approx(expected, abs=1e-7)


@given(GROUPS)
def test_with_one_prompt_all_baselines_are_the_same(members):
    rewards = [value / 8 for _, value in members]
    ways = [advantages(rewards, prompts="a" * len(rewards), own=own) for own in (0.0, 0.5, 1.0)]
    assert ways[0] == ways[2] and ways[1] == pytest.approx(ways[0], abs=1e-12)


def test_a_predictors_baseline_goes_by_prompt_too():
    scores = [two(1.0, 1.0), two(0.0, 1.0), two(1.0, 0.0), two(1.0, 0.0)]
    members = [replace(one, candidate_id=name) for name, one in zip("aabb", scores, strict=True)]
    found = by_predictor(credit([group(*members)], own(1.0).with_values({"train.baseline": "prompt"})))
    assert found["first"] == pytest.approx([math.sqrt(2), -math.sqrt(2), 0, 0])
    assert found["second"] == []  # under each prompt it always earned the same


def test_the_default_baseline_is_the_groups_to_the_bit():
    rewards = [0.1, 0.7, 0.3, 0.3, 0.9, 0.2, 0.05]
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in rewards) / len(rewards))
    members = [under(name, value) for name, value in zip("aabbccd", rewards, strict=True)]
    found = credit([group(*members)], CONFIG)
    assert [row.advantage for row in found.rows] == [(value - mean) / (std + 1e-4) for value in rewards]


# -- what is known of half a group -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollouts", "nothing"),
    [
        ([rollout(1.0), rollout(1.0)], True),
        ([rollout(0.1 + 0.2), rollout(0.3)], True),  # equal but for rounding
        ([rollout(1.0), rollout(0.0)], False),
        ([rollout(1.0)], False),  # one says nothing
        ([rollout(1.0), rollout(0.0, outcome=Outcome.ENGINE_ERROR)], False),
        ([rollout(0.0), rollout(0.9, outcome=Outcome.PARSE_ERROR)], True),  # both earn 0
        ([], False),
    ],
)
def test_rewards_that_are_all_equal_teach_nothing(rollouts, nothing):
    assert teaches_nothing(rollouts, CONFIG) is nothing


def test_with_credit_by_predictor_all_trained_predictors_must_be_equal():
    same_sum = [two(1.0, 0.0), two(0.0, 1.0)]
    assert teaches_nothing(same_sum, CONFIG)
    assert not teaches_nothing(same_sum, own(0.5))
    second_alone = [two(1.0, 1.0), two(1.0, 0.0)]
    frozen = own(1.0).with_values({"predictors": {"second": "evolve"}})
    assert not teaches_nothing(second_alone, own(1.0)) and teaches_nothing(second_alone, frozen)
    assert teaches_nothing([rollout(0.0, calls=[]), rollout(0.0, calls=[])], own(1.0))
