import copy
import dataclasses
import json
import math
import pickle

import dspy
import pytest

from fst_optimizer.types import (
    Call,
    Candidate,
    Outcome,
    Population,
    Raised,
    Rollout,
    RolloutCounts,
    TraceStep,
    Usage,
    items_of,
)

A = Candidate({"first": "one", "second": "two"})
B = Candidate({"first": "uno", "second": "two"}, parents=(A.id,), origin="reflection", cycle=3)


def test_the_same_texts_are_the_same_candidate_whoever_proposed_them():
    assert Candidate({"second": "two", "first": "one"}, origin="given").id == A.id
    assert A.id != B.id
    assert len(A.id) == 12


def test_a_candidates_texts_cannot_be_changed_from_outside():
    texts = {"first": "one"}
    candidate = Candidate(texts)
    texts["first"] = "changed"
    assert candidate.texts["first"] == "one"
    with pytest.raises(TypeError):
        candidate.texts["first"] = "changed"
    with pytest.raises(dataclasses.FrozenInstanceError):
        candidate.origin = "seed"


def test_candidates_and_populations_survive_json():
    population = Population((A, B), 4, {A.id: {"train-0": 1.0, "train-3": 0.0}, B.id: {"train-0": 0.25}})
    again = Population.from_json(population.to_json())
    assert again == population
    assert again.candidates[1].parents == (A.id,)


def test_candidates_are_copied_and_pickled_whole():
    for again in (copy.deepcopy(B), pickle.loads(pickle.dumps(B))):
        assert again == B
        with pytest.raises(TypeError):
            again.texts["first"] = "changed"


def test_a_candidate_is_written_as_plain_json():
    plain = {"id": B.id, "texts": dict(B.texts), "parents": [A.id], "origin": "reflection", "cycle": 3}
    assert B.to_json() == plain == json.loads(json.dumps(plain))


def test_a_broken_models_numbers_and_half_characters_survive_json():
    call = Call("first", (1, 2), (3, 4), (-math.inf, -0.5), 1.0, 2, "stop", "\ud800")
    step = TraceStep("first", {"count": 3}, None, "\ud800")
    rollout = Rollout("c", "e", 0, 2, Outcome.OK, math.nan, (call,), (step,), usage={"judge": Usage(1, 2, 0, 3)})
    again = Rollout.from_json(json.loads(json.dumps(rollout.to_json())))
    assert math.isnan(again.score)
    assert (again.calls, again.usage, again.outcome) == (rollout.calls, rollout.usage, Outcome.OK)
    assert again.trace == (TraceStep("first", {"count": "3"}, None, "\ud800"),)  # inputs as the reflector reads them
    population = Population((Candidate({"first": "\ud800"}),), 1, {"x": {"train-0": math.nan}})
    scored = Population.from_json(json.loads(json.dumps(population.to_json())))
    assert scored.candidates == population.candidates
    assert math.isnan(scored.scores["x"]["train-0"])


def test_a_rollout_keeps_what_was_raised_and_older_files_know_nothing_of_it():
    raised = Raised("KeyError", "program.py:3 in forward", ("KeyError: 'gold'",))
    rollout = Rollout("c", "e", 0, 2, Outcome.PROGRAM_ERROR, 0.0, raised=raised)
    written = json.loads(json.dumps(rollout.to_json()))
    assert Rollout.from_json(written) == rollout
    del written["raised"]
    assert Rollout.from_json(written).raised is None


def test_the_mean_score_is_over_the_anchor_and_the_earliest_wins_a_tie():
    population = Population((A, B), 0, {A.id: {"x": 1.0, "y": 0.0}, B.id: {"x": 0.5, "y": 0.5}})
    assert population.mean_score(A) == population.mean_score(B) == 0.5
    assert population.best is A
    assert Population((A, B)).mean_score(B) == 0.0


def test_counts_add_up_and_training_is_fast_and_slow():
    counts = RolloutCounts(fast=1, slow=2).plus(fast=10, eval=5).plus(reused=1)
    assert counts.to_json() == {"fast": 11, "slow": 2, "eval": 5, "reused": 1}
    assert counts.training == 13


def test_a_rollouts_tokens_are_the_sampled_ones_of_all_calls():
    call = Call("first", (1, 2, 3), (4, 5), (-1.0, -2.0), 1.0, 0, "stop")
    assert Rollout("c", "e", 0, 0, Outcome.OK, 1.0, (call, call)).tokens == 4


def test_outcomes_compare_as_the_words_that_files_hold():
    assert Outcome.OK == "ok"
    assert [str(outcome) for outcome in Outcome] == [
        "ok",
        "parse_error",
        "truncated",
        "prompt_too_long",
        "program_error",
        "timeout",
        "engine_error",
    ]


def test_items_are_named_after_their_place():
    examples = [dspy.Example(q=letter).with_inputs("q") for letter in "ab"]
    assert [(item.id, item.example.q) for item in items_of(examples, "val")] == [("val-0", "a"), ("val-1", "b")]
