import threading

import dspy
import pytest
from dspy.utils import DummyLM

from fst_optimizer.errors import UserError
from fst_optimizer.evolve.gepa_adapter import GepaAdapter, Trajectory, reflective_entries
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.types import Item, Outcome, Rollout, TraceStep


def rollout(**fields):
    base = {"candidate_id": "c", "example_id": "train-0", "index": 0, "policy_version": 0}
    return Rollout(**{**base, "outcome": Outcome.OK, "score": 0.0, **fields})


def item(index=0):
    return Item(f"train-{index}", dspy.Example(question="a b", answer="b a").with_inputs("question"))


def step(predictor="first", outputs=None, completion="", **inputs):
    return TraceStep(predictor, inputs, outputs, completion)


class Nested(dspy.Module):
    def __init__(self):
        super().__init__()
        self.alone = dspy.Predict("question -> answer")
        self.listed = [dspy.Predict("question -> middle"), dspy.ChainOfThought("middle -> answer")]
        self.keyed = {"check": dspy.Predict("answer -> ok: bool")}


def test_texts_of_predictors_in_attributes_lists_and_dicts():
    assert sorted(seed_texts(Nested())) == ["alone", "keyed['check']", "listed[0]", "listed[1].predict"]


def test_applied_texts_are_read_back_and_the_original_is_untouched():
    program = Nested()
    before = seed_texts(program)
    texts = {name: f"Rule for {name}." for name in before}
    assert seed_texts(apply_texts(program, texts)) == texts
    assert seed_texts(program) == before


def test_texts_of_some_components_leave_the_others():
    program = Nested()
    fresh = apply_texts(program, {"alone": "New."})
    assert seed_texts(fresh) == {**seed_texts(program), "alone": "New."}


def test_demos_stay_and_the_lm_is_shared_not_copied():
    program, lm, other = Nested(), DummyLM([{"answer": "x"}]), DummyLM([{"answer": "y"}])
    program.set_lm(lm)
    program.judge = other
    program.alone.demos = [dspy.Example(question="a", answer="b")]
    fresh = apply_texts(program, {"alone": "New."})
    assert fresh.alone.demos == program.alone.demos
    assert fresh.alone.demos is not program.alone.demos
    assert all(predictor.lm is lm for predictor in fresh.predictors())
    assert fresh.judge is other


def test_a_bare_predictor_is_a_program():
    assert seed_texts(apply_texts(dspy.Predict("a -> b"), {"self": "Go."})) == {"self": "Go."}


def test_what_cannot_be_copied_is_shared_and_predictors_never_are():
    program = Nested()
    program.lock = threading.Lock()
    program.listed[0].client = {"lock": threading.Lock()}
    fresh = apply_texts(program, {"listed[0]": "New."})
    assert fresh.lock is program.lock
    assert fresh.listed[0] is not program.listed[0]
    assert seed_texts(program)["listed[0]"] != "New."


def test_an_unknown_component_is_named_with_the_nearest_known_one():
    with pytest.raises(UserError, match="no predictor 'alon'; did you mean 'alone'"):
        apply_texts(Nested(), {"alon": "New."})


def test_an_entry_has_what_gepa_shows_and_the_predictors_own_feedback_and_score():
    seen = Trajectory(
        item(),
        rollout(
            trace=(step(outputs={"middle": "x"}, question="a b"), step("second", {"answer": "y"}, middle="x")),
            score=0.5,
            feedback={"first": "Swap them.", "": "Wrong."},
            predictor_scores={"first": 0.25},
        ),
    )
    (entry,) = reflective_entries("first", [seen])
    assert entry["Inputs"] == {"question": "a b"}
    assert entry["Generated Outputs"] == {"middle": "x"}
    assert entry["Feedback"] == "Swap them."
    assert entry["Score"] == 0.25
    assert entry["Instance"] == ("b a",)
    (second,) = reflective_entries("second", [seen])
    assert second["Feedback"] == "Wrong."
    assert second["Score"] == 0.5


def test_a_failed_parse_shows_the_raw_completion_and_what_was_expected():
    failed = rollout(
        trace=(step(completion="bla bla", question="a b"),),
        outcome=Outcome.PARSE_ERROR,
        error="Expected the field `answer`.",
    )
    (entry,) = reflective_entries("first", [Trajectory(item(), failed)])
    assert "bla bla" in entry["Generated Outputs"]
    assert "Expected the field `answer`." in entry["Feedback"]
    assert entry["Metric Feedback"] == ""


def test_without_feedback_the_score_speaks():
    seen = Trajectory(
        item(), rollout(trace=(step(outputs={"answer": 3}, question="q"),), score=0.25, error="tool broke")
    )
    (entry,) = reflective_entries("first", [seen])
    assert entry["Feedback"] == "This response got a score of 0.25.\nThe program then failed: tool broke"
    assert entry["Generated Outputs"] == {"answer": "3"}
    assert entry["Metric Feedback"] == ""


def test_in_a_loop_the_failed_turn_tells_most_then_the_last():
    fine = [step(outputs={"answer": str(turn)}, turn=turn) for turn in range(3)]
    (entry,) = reflective_entries("first", [Trajectory(item(), rollout(trace=tuple(fine)))])
    assert entry["Inputs"] == {"turn": "2"}
    (entry,) = reflective_entries("first", [Trajectory(item(), rollout(trace=(*fine, step(turn=3), fine[0])))])
    assert entry["Inputs"] == {"turn": "3"}


def test_rollouts_that_never_reached_the_component_and_repeated_examples_are_left_out():
    reached = Trajectory(item(0), rollout(trace=(step(outputs={"answer": "x"}),)))
    missed = Trajectory(item(1), rollout(example_id="train-1", trace=(step("second", {"answer": "x"}),)))
    assert len(reflective_entries("first", [reached, missed, reached])) == 1


def test_the_bridge_hands_scores_and_trajectories_to_gepa():
    bridge = GepaAdapter(lambda texts, items: [rollout(example_id=one.id, score=0.5) for one in items])
    batch = bridge.evaluate([item(0), item(1)], {"first": "Go."}, capture_traces=True)
    assert batch.scores == [0.5, 0.5]
    assert [seen.item.id for seen in batch.trajectories] == ["train-0", "train-1"]
    assert bridge.propose_new_texts is None
    assert bridge.make_reflective_dataset({"first": "Go."}, batch, ["first"]) == {"first": []}


def test_a_dataset_that_cannot_be_built_is_remembered_since_gepa_only_logs_it():
    bridge = GepaAdapter(lambda texts, items: [])
    broken = bridge.evaluate([], {"first": "Go."})
    broken.trajectories = [None]
    with pytest.raises(AttributeError):
        bridge.make_reflective_dataset({"first": "Go."}, broken, ["first"])
    assert isinstance(bridge.failure, AttributeError)
