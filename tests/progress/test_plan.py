from dataclasses import replace

import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.progress.plan import Plan, Position, stages_left, steps_planned
from helpers.toy import SETTINGS, TRAIN, VAL, Reflection, answer, optimizer, student_of

PLAN = Plan(
    "fst",
    cycles=2,
    steps_per_cycle=2,
    fast_rollouts=20,
    anchor=4,
    step_rollouts=10,
    eval_rollouts=12,
    test_rollouts=0,
)
CYCLE = ["fast", "eval of prompts", "slow", "slow", "eval of weights"]


def left(at=Position(), fast=None, **changes):  # noqa: B008
    return list(stages_left(replace(PLAN, **changes), at, fast))


def test_a_plan_counts_the_rollouts_that_the_settings_ask_for():
    values = {"rollout.group_size": 8, "rollout.batch_size": 5, "eval.max_examples": 40, "eval.kl_examples": 32}
    plan = Plan.of(FSTConfig().with_values(values), val=100, test=7, teachers=2)
    assert plan.step_rollouts == 5 * (8 + 2)
    assert plan.eval_rollouts == 40 + 32
    assert plan.test_rollouts == 7


def test_all_is_left_before_a_run():
    assert left() == ["first eval", *CYCLE, *CYCLE]
    assert left(test_rollouts=9) == ["first eval", "test", *CYCLE, *CYCLE, "test"]


def test_a_run_in_the_middle_has_the_rest_of_its_cycle_left():
    assert left(Position(cycle=1, number=4, stage="slow", step=3)) == ["slow", "eval of weights"]
    assert left(Position(cycle=2, number=0, stage="test", over=True), test_rollouts=9) == ["test"]


def test_methods_leave_their_parts_out():
    evals = ["eval of prompts", "eval of weights"]
    assert left(method="gepa", cycles=1) == ["first eval", "fast", *evals]
    assert left(method="rl", cycles=1) == ["first eval", "eval of prompts", "slow", "slow", "eval of weights"]


def test_no_fast_round_is_left_when_the_search_is_over():
    over = Position(cycle=1, number=1, stage="fast", search_over=True)
    ends = ["eval of prompts", "slow", "slow", "eval of weights"]
    assert left(over, method="sequential", search_rollouts=50, searches_first=True, max_rollouts=100) == ends
    assert left(over, method="gepa") == []


def test_steps_end_at_their_cap_and_no_cycle_follows():
    assert left(max_steps=1) == ["first eval", "fast", "eval of prompts", "slow", "eval of weights"]
    assert left(max_steps=2) == ["first eval", *CYCLE]
    assert steps_planned(replace(PLAN, max_steps=3), Position()) == 3


def test_rollouts_end_at_their_cap():
    # 20 and two steps of 10 make 40; 45 leave no room for a step after the second fast round.
    assert left(max_rollouts=45) == ["first eval", *CYCLE, "fast", "eval of prompts", "eval of weights"]
    # Fast rounds that take 5 leave more: 5 + 20 + 5 + 10.
    assert left(max_rollouts=45, fast=5.0).count("slow") == 3


def test_a_plan_without_an_end_is_not_counted_out():
    assert steps_planned(replace(PLAN, cycles=10**9), Position()) is None
    assert steps_planned(replace(PLAN, cycles=10**9, max_steps=5), Position()) == 5


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("fst", {}),
        ("fst", {"budget.max_steps": 3}),
        ("fst", {"budget.max_rollouts": 40}),
        ("rl", {"budget.max_steps": 3}),
        ("rl", {"budget.max_rollouts": 20}),
        ("gepa", {"budget.max_rollouts": 30}),
        ("sequential", {"budget.max_rollouts": 60, "budget.max_cycles": 5}),
        ("once", {"fast.once_rollouts": 30, "budget.max_cycles": 5}),
        ("once", {"fast.once_rollouts": 0}),
    ],
)
def test_a_plan_foresees_the_rounds_and_steps_of_a_run(scripted, tmp_path, method, values):
    heard = []
    # A reflector that always has a new text: what ends a search before its rollouts do cannot be foreseen.
    options = {"reflection_lm": Reflection(), "callbacks": [heard.append], "progress": False}
    fst = optimizer(tmp_path / "run", values={"method": method, **values}, **options)
    fst.compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    fast = [event["rollouts"]["fast"] for event in heard if event["kind"] == "fast"]
    plan = next(Plan(**event["plan"]) for event in heard if event["kind"] == "start")
    expected = list(stages_left(plan, Position(), fast[-1] / len(fast) if fast else None))
    assert expected.count("slow") == sum(event["kind"] == "step" for event in heard)
    assert expected.count("fast") == len(fast)
    assert steps_planned(plan, Position(), fast[-1] / len(fast) if fast else None) == expected.count("slow")


def test_a_run_tells_its_callbacks_where_it_is(scripted, tmp_path):
    heard = []
    fst = optimizer(tmp_path / "run", callbacks=[heard.append], progress=False)
    fst.compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    start, *rest = heard
    assert (start["kind"], start["run_dir"], start["resumed"]) == ("start", str(tmp_path / "run"), False)
    assert start["val_score_before"] is start["best"] is None
    phases = [(one["cycle"], one["number"], one["phase"]) for one in rest if one["kind"] == "phase"]
    numbers = [(1, "fast"), (2, "eval"), (3, "slow"), (4, "slow"), (5, "eval")]
    cycles = SETTINGS["budget"]["max_cycles"]
    assert phases == [(0, 0, "eval"), *((cycle, *one) for cycle in range(cycles) for one in numbers)]
