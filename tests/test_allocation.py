"""Where rollouts go, in whole runs: the toy program with a policy that is told what to say."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fst_optimizer import FSTConfig, UserError, schedule
from fst_optimizer.evolve.round import FastRound
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.run.allocation import Allocation, Ledger
from fst_optimizer.run.gains import Point
from fst_optimizer.run.state import Best, State, Stream
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.types import Candidate, Item, Population, RolloutCounts
from helpers.toy import answer, assert_same_run, optimizer, run_toy, said, untimed_metrics

ADAPTIVE = {"allocation": "adaptive", "budget.max_rollouts": 120, "budget.max_cycles": 30, "train.steps_per_cycle": 3}
BEFORE = [
    *[
        ("eval", 0, 0, 4),
        ("fast", 8, 0, 4),
        ("eval", 8, 0, 8),
        ("step", 8, 8, 8),
        ("step", 8, 16, 8),
        ("eval", 8, 16, 14),
    ],
    *[("fast", 15, 16, 14), ("eval", 15, 16, 20), ("step", 15, 24, 20), ("step", 15, 32, 20), ("eval", 15, 32, 26)],
]
SEED, GOOD, UNSURE = (Candidate({"answer": text}) for text in ("Say it.", "Say it backwards.", "Say something."))


def told(run_dir):
    """The lines that say what was decided, by cycle."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    found = {line["cycle"]: line for line in lines if "allocation" in line}
    assert sum("allocation" in line for line in lines) == len(found)
    return found, lines


def test_by_default_nothing_is_decided_and_a_run_is_what_it_was(scripted, tmp_path):
    """The numbers are those of the commit before there was anything to decide."""
    result = run_toy(tmp_path, scripted(answer))
    lines = untimed_metrics(tmp_path)
    assert not any("allocation" in line or "reason" in line for line in lines)
    seen = [
        (line["kind"], line["rollouts"]["fast"], line["rollouts"]["slow"], line["rollouts"]["eval"]) for line in lines
    ]
    assert seen == BEFORE
    assert [line["reward_mean"] for line in lines if line["kind"] == "step"] == [0.5625, 0.625, 0.4375, 0.25]
    assert result["candidate"] == {"first": "Answer.", "second": "Answer. Mind the gap."}
    assert read_json(tmp_path / "state.json")["state"]["ledger"] is None


@pytest.mark.parametrize("method", ["rl", "gepa", "sequential", "once"])
def test_only_fst_adapts(scripted, tmp_path, method):
    values = {"method": method, "budget.max_rollouts": 60}
    run_toy(tmp_path / "fixed", scripted(answer), values=values)
    run_toy(tmp_path / "adaptive", scripted(answer), values=values | {"allocation": "adaptive"})
    assert untimed_metrics(tmp_path / "fixed") == untimed_metrics(tmp_path / "adaptive")


def test_each_cycle_says_once_what_it_does_and_does_it(scripted, tmp_path):
    result = run_toy(tmp_path, scripted(answer), values=ADAPTIVE)
    found, lines = told(tmp_path)
    assert result["ended"] == "budget" and result["cap"] == "max_rollouts"
    assert sorted(found) == list(range(result["cycles"])) and len(found) > 3
    assert found[0]["kind"] == "fast" and found[0]["reason"] == "nothing is known of the prompts yet"
    assert {bool(line["allocation"]["steps"]) for line in found.values()} == {True, False}  # both sides have turns
    for cycle, line in found.items():
        own = [one for one in lines if one["cycle"] == cycle]
        decided = line["allocation"]
        rounds = [one for one in own if one["kind"] == "fast"]
        assert len(rounds) == bool(decided["examples"])
        assert all(one["proposals"] <= decided["proposals"] for one in rounds)
        assert sum(one["kind"] == "step" for one in own) <= decided["steps"]
        assert own[-1]["kind"] == "eval"
    spent = result["rollouts"]
    assert 120 - 8 < spent["fast"] + spent["slow"] <= 120
    assert min(spent["fast"], spent["slow"]) >= 0.1 * 120 - 8


@pytest.mark.slow
@pytest.mark.parametrize("passage", [9, 60, 110])
def test_a_run_that_was_killed_decides_the_same(scripted, tmp_path, passage):
    run_toy(tmp_path / "whole", scripted(answer), values=ADAPTIVE)
    with inject("rollout.end", raising(KeyboardInterrupt()), after=passage), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer), values=ADAPTIVE)
    run_toy(tmp_path / "run", scripted(answer), values=ADAPTIVE, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_nothing_is_scored_again_when_there_was_nothing_new_and_the_weights_stay(scripted, tmp_path):
    # Always right: no candidate fails on the anchor, and no group has signal.
    run_toy(tmp_path, scripted(lambda prompt, request: said(True)), values=ADAPTIVE)
    _, lines = told(tmp_path)
    assert [line["kind"] for line in lines].count("fast") == 1
    assert lines[-1]["policy_version"] == 0


def test_an_adaptive_run_needs_a_cap_on_rollouts():
    with pytest.raises(UserError, match=r"budget.max_rollouts is None: with allocation 'adaptive' a cycle is the turn"):
        FSTConfig(allocation="adaptive")
    assert not FSTConfig(allocation="adaptive", method="rl").adapts
    with pytest.raises(UserError, match="allocation is 'adaptiv': did you mean 'adaptive'"):
        FSTConfig(allocation="adaptiv")


def state(**fields):
    """Under way, with the seed known."""
    start = State(Population((SEED,), 3), Best(SEED, 2, 0.5), seed=SEED, started=True, policy_version=3)
    return replace(start, **fields)


def config(**values):
    small = {"fast.anchor_size": 4, "fast.population": 3, "rollout.group_size": 6, "rollout.batch_size": 2}
    small |= {"budget.max_rollouts": 10**6}
    return optimizer(None, values={**small, "allocation": "adaptive", **values}).config


def test_what_was_decided_stands_until_the_cycle_is_done():
    before = state(ledger=Ledger(now=Allocation(0, 0, 2, "why")), phase=2)
    assert schedule.allotted(config(), before) == before
    assert not schedule.has_fast_round(config(), before)
    assert [schedule.has_slow_steps(config(), replace(before, phase=phase)) for phase in (3, 4, 5)] == [
        True,
        True,
        False,
    ]
    # The data goes on by the steps that were to be taken.
    assert schedule.next_cycle(config(), replace(before, batch=7)).batch == 9
    fixed = config(allocation="fixed")
    assert schedule.allotted(fixed, state()) == state() and schedule.has_fast_round(fixed, before)
    assert schedule.next_cycle(fixed, replace(before, batch=7)).batch == 9  # T is 2


def test_a_round_starts_from_those_that_wait_and_the_seed_too():
    waits = state(population=Population((GOOD,), 3), ledger=Ledger(waiting=(UNSURE,)))
    assert schedule.searched_population(config(), waits).candidates == (GOOD, UNSURE, SEED)
    assert schedule.searched_population(config(**{"fast.population": 2}), waits).candidates == (GOOD, SEED)
    assert schedule.searched_population(config(**{"fast.population": 1}), waits).candidates == (GOOD, SEED)
    assert schedule.searched_population(config(), state()).candidates == (SEED,)
    assert schedule.searched_population(config(allocation="fixed"), waits) == waits.population
    assert schedule.searched_population(config(), replace(waits, seed=None)) == waits.population


def test_after_a_switch_a_stream_tries_the_seed_beside_the_population():
    fixed, population = config(allocation="fixed"), Population((GOOD,), 3, {GOOD.id: {"a": 1.0}})
    after = state(population=population, stream=Stream(2, retry=True))
    assert schedule.searched_population(fixed, after).candidates == (GOOD, SEED)
    before = replace(after, stream=Stream(2))
    assert schedule.searched_population(fixed, before) == population
    assert schedule.searched_population(fixed, replace(after, population=Population((SEED,)))).candidates == (SEED,)


def found(lead, accepted=0, **fields):
    """A fast round after which UNSURE leads the seed by so much on each of four examples."""
    seed = {name: 0.2 + 0.1 * (name in "ac") for name in "abcd"}
    rows = {SEED.id: seed, UNSURE.id: {name: score + lead for name, score in seed.items()}}
    kept = Population((UNSURE, SEED), 3, rows)
    return FastRound(kept, (), ("ended: patience",), accepted=accepted, rollouts=16, scores=rows, **fields)


def test_what_is_not_surely_better_than_the_seed_waits():
    # The scores of both differ by the same on every example: their noise is the floor's, .05.
    sure = found(0.1)
    assert schedule.kept_population(config(), state(), sure).candidates == (UNSURE,)
    # Of two new ones, the better one leads by .6 of the noise by luck alone.
    unsure = found(0.09, accepted=2)
    kept = schedule.kept_population(config(), state(), unsure)
    assert kept.candidates == (SEED,) and kept.mean_score(SEED) == pytest.approx(0.25)
    after = schedule.after_fast_round(config(), state(population=Population((GOOD,), 3)), unsure)
    assert after.ledger.waiting == (UNSURE,) and after.ledger.lead == (pytest.approx(0.06, abs=0.002), 0.05)
    assert schedule.kept_population(config(allocation="fixed"), state(), unsure) == unsure.population
    nothing = FastRound(Population((GOOD, SEED), 3), (), ("ended: no rollouts left",))
    assert schedule.kept_population(config(), state(), nothing) == state().population


def test_a_prompt_that_was_trained_under_is_dropped_when_it_no_longer_leads():
    known = Ledger(points=(Point(8, 0.5, 0.01), Point(16, 0.6, 0.01)), flat=("a",))
    trained = state(population=Population((UNSURE,), 3), ledger=known)
    stays = schedule.after_fast_round(config(), trained, found(0.1))
    assert stays.ledger.points == known.points and stays.ledger.waiting == ()
    dropped = found(0.0)
    assert schedule.kept_population(config(), trained, dropped).candidates == (SEED,)
    after = schedule.after_fast_round(config(), trained, dropped).ledger
    assert (after.points, after.flat, after.waiting) == ((), (), (UNSURE,)) and after.weights.precision > 0


def test_rounds_under_the_same_weights_are_one_search():
    first = schedule.after_fast_round(config(), state(), found(0.0, tried=("x",)))
    again = schedule.after_fast_round(config(), first, found(0.0, tried=("y",)))
    assert (first.tried, again.tried) == (("x",), ("x", "y"))
    moved = schedule.after_fast_round(config(), replace(first, policy_version=4), found(0.0))
    assert moved.tried == ()


def test_examples_without_signal_are_left_out_and_tried_again_when_both_sides_are_idle():
    items = [Item(name, None) for name in ("a", "b", "c")]
    flat = state(ledger=Ledger(now=Allocation(0, 0, 2, "why"), flat=("a", "c"), still=2, round_version=3))
    assert [item.id for item in schedule.unlearned(config(), flat, items)] == ["b"]
    assert schedule.unlearned(config(allocation="fixed"), flat, items) == tuple(items)
    closed = replace(flat, ledger=replace(flat.ledger, closed=True))
    again = schedule.allotted(config(), closed)
    assert again.ledger.now.steps == 2 and not again.ledger.flat and not again.ledger.still
    # The prompts come first where they can be tried.
    assert schedule.allotted(config(), flat).ledger.now.steps == 0
    assert schedule.after_slow_step(config(), flat).ledger.still == 3


def test_validations_may_be_rarer_but_for_the_last_one(scripted, tmp_path):
    values = {"eval.every_rollouts": 50, "budget.max_cycles": 3}
    run_toy(tmp_path / "often", scripted(answer), values=values | {"eval.every_rollouts": 0})
    result = run_toy(tmp_path / "rarely", scripted(answer), values=values)
    often, rarely = (untimed_metrics(tmp_path / name) for name in ("often", "rarely"))
    evals = [line["rollouts"]["fast"] + line["rollouts"]["slow"] for line in rarely if line["kind"] == "eval"]
    assert evals[0] == 0 and evals[-1] == result["rollouts"]["fast"] + result["rollouts"]["slow"]
    assert all(later - earlier >= 50 for earlier, later in pairwise(evals[:-1]))
    assert len(evals) < sum(line["kind"] == "eval" for line in often)
    assert rarely[-1]["kind"] == "eval" and rarely[-1]["step"] == result["steps"]
    # What is learned is the same.
    assert [line["reward_mean"] for line in rarely if line["kind"] == "step"] == [
        line["reward_mean"] for line in often if line["kind"] == "step"
    ]


def test_a_validation_is_due_at_first_after_enough_rollouts_and_at_the_end():
    rare = config(**{"eval.every_rollouts": 100, "budget.max_cycles": 5, "allocation": "fixed"})

    def at(training, **fields):
        return state(rollouts=RolloutCounts(slow=training), validated_at=200, **fields)

    assert [schedule.validation_due(rare, at(spent), ends=True) for spent in (200, 299, 300)] == [False, False, True]
    assert schedule.validation_due(rare, replace(at(200), started=False), ends=False)
    assert schedule.validation_due(rare, at(200, cycle=4), ends=True)
    assert not schedule.validation_due(rare, at(200, cycle=4), ends=False)
    assert schedule.validation_due(rare, at(200, ended="budget"), ends=True)
    stage = rare.with_values({"budget.stage_rollouts": 210})
    assert schedule.validation_due(stage, at(200, stream=Stream(2)), ends=True)  # 10 are less than a step of 12
