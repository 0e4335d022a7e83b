"""Runs whose groups are shared, stopped, refilled, ordered or filled otherwise: counts, caps, and resumes."""

from collections import defaultdict

import pytest

from fst_optimizer.failpoints import inject, raising
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.run.state import State
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.train.trainer import Trainer
from helpers.toy import answer, assert_same_run, coin, optimizer, said, student_of
from helpers.toy import examples as examples_of

MANY = examples_of(24)
VAL = examples_of(4, start=100)
REUSE = {"rollout.reuse": "first_step", "fast.temperature": 1.0}
WAYS = {
    "posterior": {"rollout.shares": "posterior"},
    "prompt": {"train.baseline": "prompt"},
    "stop": {"rollout.stop_flat": True},
    "refill": {"rollout.refill": 3},
    "refill by predictor": {"rollout.refill": 3, "train.credit": "predictor"},
    "undecided": {"rollout.order": "undecided", "rollout.refill": 2},
    "reuse": REUSE,
    "adaptive": {
        **REUSE,
        "rollout.refill": 2,
        "allocation": "adaptive",
        "budget.max_rollouts": 90,
        "budget.max_cycles": 12,
    },
    "reuse by predictor": {**REUSE, "train.credit": "predictor", "rollout.refill": 2},
}
UNSETTLED = {"monitors.flat": "off", "rollout.group_size": 4}


def hard(prompt, request):
    """Right in every fourth example or so, and then half of the time."""
    number = sum(map(ord, prompt.rsplit("question", 1)[-1][:40])) % 3
    return said(number == 0 and request.seed % 2)


def run(run_dir, policy, *, train=MANY, values=None, **options):
    fst = optimizer(run_dir, values={**UNSETTLED, **(values or {})}, **options)
    return fst.compile(student_of(policy), trainset=train, valset=VAL).detailed_results.result


def steps_of(run_dir):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "step"]


@pytest.fixture
def asked(monkeypatch):
    """Every batch of requests: (version, temperature, capture, requests)."""
    seen, collect = [], Collector.run

    def asking(self, requests, **how):
        seen.append((how["version"], how["temperature"], how.get("capture", False), list(requests)))
        return collect(self, requests, **how)

    monkeypatch.setattr(Collector, "run", asking)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "after"),
    [
        *[("posterior", 40), ("prompt", 40), ("stop", 38), ("refill", 36), ("refill", 44), ("refill by predictor", 40)],
        *[("undecided", 55), ("reuse", 30), ("reuse", 38), ("reuse by predictor", 36), ("adaptive", 40)],
    ],
)
def test_a_run_that_is_killed_and_resumed_is_the_whole_one(scripted, tmp_path, way, after):
    run(tmp_path / "whole", scripted(answer), values=WAYS[way])
    with inject("rollout.end", raising(KeyboardInterrupt()), after=after), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", scripted(answer), values=WAYS[way])
    run(tmp_path / "run", scripted(answer), values=WAYS[way], resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# -- flat groups -----------------------------------------------------------------------------------------------------


def test_flat_groups_cost_half_and_their_places_are_taken(scripted, tmp_path, asked):
    values = {"rollout.refill": 2, "method": "rl"}
    result = run(tmp_path / "run", scripted(hard), values=values)
    lines = steps_of(tmp_path / "run")
    assert sum(line["refilled"] for line in lines) > 0 and all(line["refilled"] <= 2 for line in lines)
    for line in lines:
        groups = 2 + line["refilled"]
        assert line["groups"] == groups and groups - line["given_up"] <= 2
        assert sum(line["outcomes"].values()) == 2 * groups + 2 * (groups - line["given_up"])  # halves of 4
    assert result["rollouts"]["slow"] == sum(sum(line["outcomes"].values()) for line in lines)
    sampled = [[one.item.id for one in requests] for _, temperature, _, requests in asked if temperature]
    # Refilled examples are none of the step's.
    assert all(len(set(names)) * 2 >= len(names) or len(set(names)) == 2 for names in sampled)


def test_a_group_that_goes_on_has_the_rollouts_that_it_would_have_had(scripted, tmp_path, asked):
    def sampled():
        found = {
            (version, one.candidate.id, one.item.id, one.index, one.draw)
            for version, _, _, requests in asked
            for one in requests
            if one.draw
        }
        asked.clear()
        return found

    run(tmp_path / "whole", scripted(answer), values={"method": "rl"})
    whole = sampled()
    run(tmp_path / "run", scripted(answer), values={"method": "rl", "rollout.stop_flat": True})
    stopped = sampled()
    assert stopped < whole
    assert sum(line["given_up"] for line in steps_of(tmp_path / "run")) == len(whole - stopped) / 2 > 0


def test_a_refill_never_passes_the_cap(scripted, tmp_path):
    for cap in (12, 17, 21, 26):
        values = {"rollout.refill": 9, "method": "rl", "budget.max_rollouts": cap, "budget.max_cycles": 9}
        result = run(tmp_path / f"run{cap}", scripted(lambda prompt, request: said(False)), values=values)
        assert cap - 8 < result["rollouts"]["slow"] <= cap
        assert (result["ended"], result["cap"]) == ("budget", "max_rollouts")


def test_a_cap_that_is_reached_in_the_middle_of_a_step_leaves_it_undone(scripted, tmp_path, monkeypatch):
    batches, collect = [], Collector.run

    def capped(self, requests, **how):
        batches.append(len(requests))
        if len(batches) == 3:  # the validation, first halves, second halves
            self.meter.tokens = 10**9
        return collect(self, requests, **how)

    monkeypatch.setattr(Collector, "run", capped)
    values = {"rollout.stop_flat": True, "method": "rl", "budget.max_tokens": 10**8}
    result = run(tmp_path / "run", scripted(coin), values=values)
    assert (result["ended"], result["cap"], result["steps"]) == ("budget", "max_tokens", 0)
    assert batches[1] == 4 and result["rollouts"]["slow"] == 4  # the first halves count


# -- examples by how undecided they are ------------------------------------------------------------------------------


def test_what_steps_saw_decides_the_next_cycles_batches_and_is_in_the_state(scripted, tmp_path, asked):
    values = {"rollout.order": "undecided", "method": "rl", "budget.max_cycles": 3}
    run(tmp_path / "run", scripted(hard), values=values)
    state = State.from_json(read_json(tmp_path / "run" / "state.json")["state"])
    drawn = {one.item.id for _, temperature, _, requests in asked if temperature for one in requests if one.draw}
    assert set(state.success) == set(state.success_now) == drawn
    assert all(0 <= one.mean <= 1 for one in state.success.values())
    run(tmp_path / "plain", scripted(hard), values={"method": "rl", "budget.max_cycles": 3})
    plain = State.from_json(read_json(tmp_path / "plain" / "state.json")["state"])
    assert plain.success == {} == plain.success_now


# -- rollouts of the fast round --------------------------------------------------------------------------------------


def test_the_first_step_takes_the_fast_rounds_rollouts_and_runs_the_rest(scripted, tmp_path, asked, monkeypatch):
    trained, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows: trained.append(rows) or step(self, rows))
    # 6 examples, 2 a step: the anchor of 3 holds the first batch.
    result = run(tmp_path / "run", scripted(answer), values=REUSE)
    first, second, *_ = steps_of(tmp_path / "run")
    assert first["reused"] > 0 == second["reused"]
    assert sum(first["outcomes"].values()) == 8 - first["reused"] and sum(second["outcomes"].values()) == 8
    fast = [one for one in read_metrics(tmp_path / "run" / "metrics.jsonl") if one["kind"] == "fast"]
    assert result["rollouts"]["reused"] == sum(line["reused"] for line in (*fast, *steps_of(tmp_path / "run")))
    assert result["rollouts"]["slow"] == sum(sum(line["outcomes"].values()) for line in steps_of(tmp_path / "run"))
    # Not one rollout is asked for again that the fast round had: same version, candidate and example.
    by_draw = defaultdict(set)
    for version, _, _, requests in asked:
        for one in requests:
            by_draw[one.draw.split()[0] if one.draw else ""].add((version, one.candidate.id, one.item.id))
    kept = sum(line["reused"] for line in steps_of(tmp_path / "run"))
    assert kept <= len(by_draw["cycle"]) * 4
    assert {call.policy_version for call in (row.call for row in trained[0])} == {0}
    assert all(row.call.temperature == 1.0 for rows in trained for row in rows)


def test_rows_of_reused_rollouts_have_the_tokens_and_log_probs_of_the_fast_round(scripted, tmp_path, monkeypatch):
    trained, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows: trained.append(rows) or step(self, rows))
    ended = []
    with inject("rollout.end", lambda rollout: ended.append(rollout) or rollout):
        run(tmp_path / "run", scripted(answer), values={**REUSE, "budget.max_cycles": 1, "train.steps_per_cycle": 1})
    calls = {id(call): call for rollout in ended for call in rollout.calls}
    (line,) = steps_of(tmp_path / "run")
    assert line["reused"] > 0 and trained
    sampled = {(call.prompt_ids, call.completion_ids, call.logprobs) for call in calls.values()}
    assert {(row.call.prompt_ids, row.call.completion_ids, row.call.logprobs) for row in trained[0]} <= sampled


def test_after_the_step_nothing_is_left_to_reuse_and_the_state_is_plain_data(scripted, tmp_path):
    states = []

    def look(data):
        if data["kind"] == "phase" and data["phase"] != "test":
            path = tmp_path / "run" / "state.json"
            states.append((data["phase"], data["number"], State.from_json(read_json(path)["state"])))

    run(tmp_path / "run", scripted(answer), values=REUSE, callbacks=[look])
    in_first = [state for phase, number, state in states if number == 3]
    later = [state for phase, number, state in states if number == 4]
    assert in_first and all(state.for_groups for state in in_first) and not any(state.for_groups for state in later)
    for state in in_first:
        assert State.from_json(state.to_json()) == state
        assert {one.policy_version for one in state.for_groups} == {state.policy_version}
        assert all(not one.trace and one.calls for one in state.for_groups)


def test_with_credit_by_predictor_the_fast_round_asks_for_predictor_scores(scripted, tmp_path, asked):
    run(tmp_path / "run", scripted(answer), values=WAYS["reuse by predictor"])
    fast = [capture for _, _, capture, requests in asked if requests[0].draw.startswith("cycle")]
    assert fast and all(fast)
    asked.clear()
    run(tmp_path / "plain", scripted(answer), values=REUSE)
    assert not all(capture for _, _, capture, requests in asked if requests[0].draw.startswith("cycle"))


@pytest.mark.parametrize("method", ["rl", "gepa"])
def test_methods_without_fast_rounds_or_steps_are_as_without_reuse(scripted, tmp_path, method):
    values = {"method": method, "fast.temperature": 1.0, "budget.max_rollouts": 40}
    one = run(tmp_path / "one", scripted(answer), values=values)
    other = run(tmp_path / "other", scripted(answer), values={**values, "rollout.reuse": "first_step"})
    assert one["rollouts"] == other["rollouts"]
