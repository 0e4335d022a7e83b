"""Caps: what ends a run, how far past it a run goes, and what is left when it ends."""

import time
from types import SimpleNamespace

import pytest

from fst_optimizer import FST, FSTConfig, UserError
from fst_optimizer.config.run import BudgetConfig
from fst_optimizer.store.files import read_json
from fst_optimizer.store.meter import Meter, model_cost_usd
from fst_optimizer.store.tally import FirstError, Tally
from fst_optimizer.types import Call, Outcome, Rollout, RolloutCounts, Usage
from helpers.toy import coin, examples, frozen, metric, student_of

TRAIN, VAL, TEST = examples(6), examples(4, start=100), examples(3, start=200)
IN_FLIGHT = 3
SETTINGS = {
    "fast": {"population": 2, "anchor_size": 2, "max_rollouts": 12, "max_proposals": 2, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": IN_FLIGHT},
    "train": {"steps_per_cycle": 2, "lr": 0.01, "warmup_steps": 0},
    "eval": {"kl_examples": 2},
    "budget": {"max_cycles": 100},
}


def compiled(student, run_dir, **values):
    config = FSTConfig.from_dict(SETTINGS).with_values(values)
    fst = FST(metric, config=config, run_dir=run_dir, testset=TEST)
    return fst.compile(student, trainset=TRAIN, valset=VAL)


def rollout(tokens, **usage):
    call = Call("first", (1,), (5,) * tokens, (-1.0,) * tokens, 1.0, 0, "stop")
    return Rollout("c", "train-0", 0, 0, Outcome.OK, 1.0, (call,), usage=usage)


@pytest.fixture
def policy(scripted):
    return scripted(coin)


@pytest.mark.parametrize(
    ("cap", "added", "reached"),
    [
        ({"max_tokens": 10}, [4, 5], ""),
        ({"max_tokens": 10}, [4, 6], "max_tokens"),
        ({}, [10**6], ""),
    ],
)
def test_tokens_add_up_to_their_cap(cap, added, reached):
    meter = Meter(BudgetConfig(**cap))
    for tokens in added:
        meter.add(rollout(tokens))
    assert meter.reached() == reached
    assert meter.spent()["tokens"] == sum(added)
    with meter.uncapped():
        assert meter.reached() == ""


def test_dollars_of_rollouts_and_of_reflection_add_up_to_their_cap():
    reflector = SimpleNamespace(calls=0, cost_usd=0.0)
    meter = Meter(BudgetConfig(max_cost_usd=5.0, prices={"a/b": (1.0, 2.0)}), reflector)
    meter.add(rollout(1, **{"a/b": Usage(1, 10**6, 0, 10**6)}))  # 1 + 2 dollars
    assert meter.reached() == ""
    reflector.calls, reflector.cost_usd = 3, 2.0
    assert meter.reached() == "max_cost_usd"
    assert (meter.spent()["reflection_calls"], meter.spent()["reflection_cost_usd"]) == (3, 2.0)


def test_a_price_that_is_unknown_is_an_error_only_where_dollars_are_capped():
    used = rollout(1, **{"nobody/knows": Usage(1, 5, 0, 5)})
    capped, free = Meter(BudgetConfig(max_cost_usd=1.0)), Meter(BudgetConfig())
    for meter in (capped, free):
        meter.add(used)
    assert free.reached() == ""
    with pytest.raises(UserError, match=r"max_cost_usd is 1\.0, and what nobody/knows costs is unknown"):
        capped.reached()


@pytest.mark.parametrize(
    ("model", "prices", "dollars"),
    [
        ("openai/gpt-x", {"openai/gpt-x": (1.0, 2.0)}, 3.0),
        ("openai/gpt-x", {"gpt-x": (1.0, 2.0)}, 3.0),
        ("gpt-x", {"openai/gpt-x": (1.0, 2.0)}, 3.0),
        ("azure/gpt-x", {"openai/gpt-x": (1.0, 2.0)}, None),  # another provider has another price
        ("openai/gpt-x", {}, None),
        ("hosted_vllm/gpt-x", {}, 0.0),
        ("hosted_vllm/gpt-x", {"hosted_vllm/gpt-x": (1.0, 2.0)}, 3.0),
    ],
)
def test_a_price_is_found_by_the_models_name_with_or_without_its_provider(model, prices, dollars):
    assert model_cost_usd(model, Usage(1, 10**6, 0, 10**6), prices) == dollars


def test_a_price_without_tokens_tells_no_cost_but_where_it_is_nothing():
    assert model_cost_usd("a/b", Usage(calls=1), {"a/b": (1.0, 2.0)}) is None
    assert model_cost_usd("a/b", Usage(calls=1), {"a/b": (0.0, 0.0)}) == 0.0


def test_a_resumed_meter_goes_on():
    meter = Meter(BudgetConfig(max_time_s=100.0, max_tokens=50))
    spent = {"rollouts": RolloutCounts(1, 2, 3, 4), "tokens": 40, "usage": {"a/b": Usage(1, 1, 0, 1)}}
    spent |= {"tally": Tally({"ok": 5, "timeout": 1}, FirstError("timeout", "late", "val-1")), "crashes": ("a at b",)}
    meter.resume(SimpleNamespace(**spent, reflection_calls=5, reflection_cost_usd=0.25), 99.0)
    assert meter.spent() == {**spent, "reflection_calls": 5, "reflection_cost_usd": 0.25}
    assert meter.reached() == ""
    meter.add(rollout(9))
    assert meter.reached() == ""
    meter.add(rollout(1))
    assert meter.reached() == "max_tokens"
    late = Meter(BudgetConfig(max_time_s=100.0))
    late.resume(SimpleNamespace(**spent, reflection_calls=0, reflection_cost_usd=None), 100.5)
    assert late.spent()["reflection_cost_usd"] is None
    assert late.reached() == "max_time_s"


def test_outcomes_are_counted_and_the_first_error_is_the_first_that_was_asked_for():
    meter = Meter(BudgetConfig())
    late, odd = (
        Rollout("c", example, 0, 0, outcome, 0.0, error="why")
        for example, outcome in (("val-0", Outcome.TIMEOUT), ("val-1", Outcome.PARSE_ERROR))
    )
    assert [meter.add(one) for one in (odd, late, odd)] == [True, True, False]  # the first that ended so
    assert meter.spent()["tally"] == Tally({"parse_error": 2, "timeout": 1})
    meter.batch_ended([late, odd, odd])
    meter.batch_ended([odd])
    assert meter.spent()["tally"].first_error == FirstError("timeout", "why", "val-0")


def test_no_more_steps_are_taken_than_allowed(policy, tmp_path):
    result = compiled(student_of(policy), tmp_path / "run", **{"budget.max_steps": 3}).detailed_results.result
    assert (result["steps"], result["ended"], result["cap"]) == (3, "budget", "max_steps")
    assert result["rollouts"]["slow"] == 3 * 8


def test_no_fast_round_is_paid_for_steps_that_will_not_be_taken(policy, tmp_path):
    result = compiled(student_of(policy), tmp_path / "run", **{"budget.max_steps": 2}).detailed_results.result
    assert (result["cycles"], result["steps"], result["cap"]) == (1, 2, "max_steps")


def tokens_of(policy):
    return sum(len(generated(policy, request)) for request in policy.engine.requests)


def generated(policy, request):
    text = coin(policy.engine.prompt_text(request), request)
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [0]


@pytest.mark.parametrize("method", ["fst", "rl", "gepa"])
def test_the_cap_of_tokens_is_passed_by_no_more_than_what_was_in_flight(policy, tmp_path, method):
    cap = 4000
    values = {"budget.max_tokens": cap, "method": method}
    better = compiled(student_of(policy), tmp_path / "run", **values)
    result = better.detailed_results.result
    assert (result["ended"], result["cap"]) == ("budget", "max_tokens")
    longest = max(len(generated(policy, request)) for request in policy.engine.requests)
    tested = 2 * len(TEST) * 2 * longest  # before and after, two calls each: not capped
    assert cap <= result["tokens"] <= cap + IN_FLIGHT * 2 * longest + tested
    # Every token that was sampled is counted.
    assert result["tokens"] == tokens_of(policy)
    assert sum(result["rollouts"][kind] for kind in ("fast", "slow", "eval")) * 2 == len(policy.engine.requests)
    assert better(question="q1").answer


def test_the_cap_of_dollars_counts_frozen_lms(policy, tmp_path):
    lm, engine = frozen()
    price = (100 * 0.15 + 10 * 0.60) / 1e6
    values = {"budget.max_cost_usd": 30 * price}
    result = compiled(student_of(policy, first=lm), tmp_path / "run", **values).detailed_results.result
    assert (result["ended"], result["cap"]) == ("budget", "max_cost_usd")
    assert 30 <= engine.calls <= 30 + IN_FLIGHT + len(TEST)
    assert result["cost_usd"] == pytest.approx(engine.calls * price)


def test_an_unknown_price_stops_a_run_whose_dollars_are_capped(policy, tmp_path):
    lm, engine = frozen("openai/nobody-knows")
    with pytest.raises(UserError, match=r"what openai/nobody-knows costs is unknown: give budget\.prices"):
        compiled(student_of(policy, first=lm), tmp_path / "run", **{"budget.max_cost_usd": 1.0})
    assert engine.calls <= len(VAL) + len(TEST) + IN_FLIGHT


def test_a_run_that_has_no_time_left_returns_what_it_has(policy, tmp_path):
    started = time.monotonic()
    result = compiled(student_of(policy), tmp_path / "run", **{"budget.max_time_s": 0.001}).detailed_results.result
    assert (result["ended"], result["cap"]) == ("budget", "max_time_s")
    assert result["rollouts"]["fast"] + result["rollouts"]["slow"] <= IN_FLIGHT
    assert result["candidate"] == {"first": "Answer.", "second": "Answer."}
    assert result["test_score_after"] is not None
    assert result["wall_s"] <= time.monotonic() - started
    assert read_json(tmp_path / "run" / "state.json")["state"]["cap"] == "max_time_s"


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", 0), ("max_tokens", 1.5), ("max_time_s", 0), ("max_cost_usd", -1)]
)
def test_caps_that_allow_nothing_are_refused(name, value):
    with pytest.raises(UserError, match=f"budget.{name} is {value}"):
        BudgetConfig(**{name: value})
