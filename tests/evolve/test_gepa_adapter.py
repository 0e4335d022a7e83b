import dspy
import pytest

from fst_optimizer.evolve.gepa_adapter import GepaAdapter, Trajectory, reflective_entries
from fst_optimizer.types import Item, Outcome, Rollout, TraceStep


def rollout(**fields):
    base = {"candidate_id": "c", "example_id": "train-0", "index": 0, "policy_version": 0}
    return Rollout(**{**base, "outcome": Outcome.OK, "score": 0.0, **fields})


def item(index=0):
    return Item(f"train-{index}", dspy.Example(question="a b", answer="b a").with_inputs("question"))


def step(predictor="first", outputs=None, completion="", **inputs):
    return TraceStep(predictor, inputs, outputs, completion)


def test_an_entry_has_what_gepa_shows_and_the_predictors_own_feedback_and_score():
    trajectory = Trajectory(
        item(),
        rollout(
            trace=(step(outputs={"middle": "x"}, question="a b"), step("second", {"answer": "y"}, middle="x")),
            score=0.5,
            feedback={"first": "Swap them.", "": "Wrong."},
            predictor_scores={"first": 0.25},
        ),
    )
    (entry,) = reflective_entries("first", [trajectory])
    assert entry["Inputs"] == {"question": "a b"}
    assert entry["Generated Outputs"] == {"middle": "x"}
    assert entry["Feedback"] == "Swap them."
    assert entry["Score"] == 0.25
    assert entry["Instance"] == ("b a",)
    (second,) = reflective_entries("second", [trajectory])
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


def test_without_feedback_the_reflector_reads_the_score():
    trajectory = Trajectory(
        item(), rollout(trace=(step(outputs={"answer": 3}, question="q"),), score=0.25, error="tool broke")
    )
    (entry,) = reflective_entries("first", [trajectory])
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


def test_the_adapter_hands_scores_and_trajectories_to_gepa():
    adapter = GepaAdapter(
        lambda wanted: [[rollout(example_id=one.id, score=0.5) for one in items] for _, items in wanted]
    )
    batch = adapter.evaluate([item(0), item(1)], {"first": "Go."}, capture_traces=True)
    assert batch.scores == [0.5, 0.5]
    assert [one.item.id for one in batch.trajectories] == ["train-0", "train-1"]
    assert adapter.propose_new_texts is None
    assert adapter.make_reflective_dataset({"first": "Go."}, batch, ["first"]) == {"first": []}


def test_a_dataset_that_cannot_be_built_is_remembered_since_gepa_only_logs_it():
    adapter = GepaAdapter(lambda wanted: [[] for _ in wanted])
    broken = adapter.evaluate([], {"first": "Go."})
    broken.trajectories = [None]
    with pytest.raises(AttributeError):
        adapter.make_reflective_dataset({"first": "Go."}, broken, ["first"])
    assert isinstance(adapter.failure, AttributeError)
