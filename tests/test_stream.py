"""Several tasks in one run: data, budget, what is noticed, and the same result after a kill."""

import dspy
import pytest

from fst_optimizer import FSTConfig, UserError
from fst_optimizer.data import stages_of
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.testing import chat_answer
from helpers.toy import SETTINGS, assert_same_run, optimizer, student_of

WORDS = {"east": ("right", "Mind the gap."), "west": ("left", "Mind the dog.")}
VALUES = {"budget.stage_rollouts": 56, "budget.max_cycles": 1}
"""Per stage two cycles of a fast round and steps of 8 rollouts: `max_cycles` does not end a stream."""


def examples(stage, count, start=0):
    """Their answers are what their stage wants; the question does not tell of it."""
    return [
        dspy.Example(question=f"{stage[0]}{start + i}", answer=WORDS[stage][0]).with_inputs("question")
        for i in range(count)
    ]


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    rule = next(rule for word, rule in WORDS.values() if word == example.answer)
    score = float(prediction.answer == example.answer)
    return dspy.Prediction(score=score, feedback="Right." if score else rule)


def answer(prompt, request):
    """Knows east half of the time and west never, each nearly always where the instruction has its rule."""
    knows = {word for word, rule in WORDS.values() if rule in prompt}
    word = "left" if knows == {"left"} or (len(knows) == 2 and request.seed % 2) else "right"
    right = request.seed % 8 if knows else request.seed % 2
    return chat_answer(middle=word, answer=word if right else "none")


TRAIN = [(stage, examples(stage, 6)) for stage in WORDS]
VAL = {stage: examples(stage, 4, start=100) for stage in WORDS}


def run_stream(run_dir, policy, values=VALUES, stages=TRAIN, valsets=VAL, **options):
    fst = optimizer(run_dir, metric=metric, values=values, **options)
    return fst.compile_stream(student_of(policy), stages, valsets=valsets).detailed_results.result


@pytest.mark.parametrize("method", ["fst", "rl", "sequential"])
def test_a_stream_gives_each_stage_its_rollouts_and_scores_all_of_them_after_each(scripted, tmp_path, method):
    result = run_stream(tmp_path, scripted(answer), VALUES | {"method": method})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert (result["ended"], result["cap"]) == ("done", None)
    assert [end["name"] for end in result["stages"]] == ["east", "west"]
    first, last = (end["rollouts"] for end in result["stages"])
    assert 56 - 8 < first <= 56 and 112 - 8 < last <= 112  # what does not pay for a step is left to the next stage
    assert all(set(end["scores"]) == {"east", "west"} for end in result["stages"])
    assert list(result["stage_scores_before"]) == ["east", "west"]
    told = [line["stage"] for line in lines]
    assert told == sorted(told) and set(told) == {"east", "west"}
    spent = {stage: [line["rollouts"] for line in lines if line["stage"] == stage] for stage in WORDS}
    assert max(one["fast"] + one["slow"] for one in spent["east"]) == first
    assert max(one["fast"] + one["slow"] for one in spent["west"]) == last
    # Nothing is chosen: the program is the last pair, and its score is the last line's.
    assert result["policy_version"] == lines[-1]["policy_version"] == result["stages"][-1]["policy_version"]
    assert result["val_score_after"] == lines[-1]["score"] == result["stages"][-1]["scores"]["west"]
    switches = [line["rollouts"] for line in lines if line.get("switch")]
    assert result["switches"] == [one["fast"] + one["slow"] for one in switches]


def test_new_feedback_is_noticed_in_the_first_fast_round_after_a_switch(scripted, tmp_path):
    result = run_stream(tmp_path, scripted(answer))
    found = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("switch")]
    assert [(line["kind"], line["stage"]) for line in found] == [("fast", "west")]
    # What was learned for the first stage is still there: the population goes on.
    assert WORDS["west"][1] in " ".join(result["candidate"].values())


@pytest.mark.parametrize("place", [("rollout.end", 20), ("files.commit", 13)])
def test_a_stream_that_was_killed_comes_to_the_same(scripted, tmp_path, place):
    run_stream(tmp_path / "whole", scripted(answer))
    with inject(place[0], raising(KeyboardInterrupt()), after=place[1]), pytest.raises(KeyboardInterrupt):
        run_stream(tmp_path / "run", scripted(answer))
    run_stream(tmp_path / "run", scripted(answer), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_stream_that_is_resumed_with_other_data_is_refused(scripted, tmp_path):
    with inject("trainer.step", raising(KeyboardInterrupt()), after=2), pytest.raises(KeyboardInterrupt):
        run_stream(tmp_path, scripted(answer))
    assert [one["name"] for one in read_json(tmp_path / "config.json")["data"]["stages"]] == ["east", "west"]
    with pytest.raises(UserError, match=r"data\.stages"):
        run_stream(tmp_path, scripted(answer), stages=[TRAIN[0], ("west", examples("west", 5))], resume=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget.stage_rollouts": None}, "budget.stage_rollouts is None: give the rollouts of each stage"),
        ({"budget.stage_rollouts": 7}, r"budget.stage_rollouts is 7: .* at least those of one step \(8"),
        ({"method": "gepa"}, "method is 'gepa'"),
        ({"budget.max_rollouts": 100}, "budget.max_rollouts is 100: a stream ends when its stages do"),
        ({"budget.patience": 2}, "budget.patience is 2: a stream ends"),
        ({"budget.max_steps": 2}, "budget.max_steps is 2: a stream ends"),
    ],
)
def test_settings_that_a_stream_cannot_have_are_refused(scripted, tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        run_stream(tmp_path / "run", scripted(answer), VALUES | values)
    assert not (tmp_path / "run").exists()


def test_compile_has_no_stages(scripted, tmp_path):
    fst = optimizer(tmp_path / "run", metric=metric, values=VALUES)
    with pytest.raises(UserError, match=r"budget\.stage_rollouts is 56: call compile_stream"):
        fst.compile(student_of(scripted(answer)), trainset=TRAIN[0][1], valset=VAL["east"])


@pytest.mark.parametrize(
    ("stages", "valsets", "said"),
    [
        (TRAIN[:1], None, "two or more pairs"),
        ("east,west", None, "two or more pairs"),
        ([TRAIN[0], TRAIN[0]], None, "the name 'east': give every stage a name of its own"),
        ([TRAIN[0], ("", TRAIN[1][1])], None, "the name ''"),
        ([TRAIN[0], ("west", [])], None, "trainset is empty"),
        (TRAIN, {"east": VAL["east"]}, r"valsets has .*east.*: give an object with the examples of every stage"),
    ],
)
def test_stages_that_are_none_are_refused(stages, valsets, said):
    with pytest.raises(UserError, match=said):
        stages_of(stages, valsets, 0)


def test_ids_differ_between_stages_and_a_fifth_of_each_is_held_out():
    first, second = stages_of([("east", examples("east", 10)), ("west", examples("west", 5))], None, 0)
    assert (len(first.train), len(first.val), len(second.train), len(second.val)) == (8, 2, 4, 1)
    ids = [item.id for stage in (first, second) for item in (*stage.train, *stage.val)]
    assert len(set(ids)) == len(ids) == 15 and {one.partition("/")[0] for one in ids} == {"1", "2"}


def test_sequential_searches_for_half_of_a_stage():
    config = FSTConfig.from_dict(SETTINGS).with_values({"method": "sequential", "budget.stage_rollouts": 96})
    assert config.search_rollouts == 48


def test_after_a_switch_the_next_fast_round_tries_the_seed_again(scripted, tmp_path):
    ran, rounds = [], []

    def keep(rollout):
        ran.append(rollout.candidate_id)
        return rollout

    def listen(event):
        if event["kind"] == "phase":
            ran.clear()
        if event["kind"] == "fast":
            rounds.append((event.get("switch", False), set(ran)))

    with inject("rollout.end", keep):
        run_stream(tmp_path, scripted(answer), VALUES | {"budget.stage_rollouts": 96}, callbacks=[listen])
    state = read_json(tmp_path / "state.json")["state"]
    place = next(number for number, (switch, _) in enumerate(rounds) if switch)
    assert state["seed"]["id"] not in rounds[place][1] and state["seed"]["id"] in rounds[place + 1][1]
    assert not state["stream"]["retry"]


def test_an_adaptive_stream_that_was_killed_comes_to_the_same(scripted, tmp_path):
    values = VALUES | {"allocation": "adaptive"}
    result = run_stream(tmp_path / "whole", scripted(answer), values)
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert result["switches"] and any(line.get("reason") == "a switch of the task was noticed" for line in lines)
    with inject("rollout.end", raising(KeyboardInterrupt()), after=90), pytest.raises(KeyboardInterrupt):
        run_stream(tmp_path / "run", scripted(answer), values)
    run_stream(tmp_path / "run", scripted(answer), values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
