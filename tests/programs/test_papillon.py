"""Papillon: what counts as a leak, the offline model, grades worked by hand, and the program run for real."""

import re
import sys

import dspy
import pytest

from fst_optimizer.evolve.extractive import is_general, lessons, sentences
from fst_optimizer.evolve.gepa_adapter import Trajectory, reflective_entries
from fst_optimizer.program.lms import attach_policy, give_lm
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Outcome, items_of
from helpers.collecting import collect_with_usage

task = load_task("programs/papillon").module
advice, facts, grading, offline = (
    sys.modules[f"{task.__package__}.{name}"] for name in ("advice", "facts", "grading", "offline")
)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("FST_PAPILLON_LM", raising=False)


# -- what counts as a leak ----------------------------------------------------------------------------------------

NAME = facts.Private("name", "Orvela Vennick")
HOME = facts.Private("address", "14 Tarnmoorly Row")
NUMBER = facts.Private("number", "44-7183")


@pytest.mark.parametrize(
    ("fact", "text", "leaked"),
    [
        (NAME, "a note from ORVELA", True),
        (NAME, "the Vennick household", True),
        (NAME, "the Vennicks, who live here", False),
        (NAME, "a note from [NAME]", False),
        (HOME, "somebody of Tarnmoorly", True),
        (HOME, "number 14 in a row of houses", False),
        (NUMBER, "his number is 44 7183.", True),
        (NUMBER, "his number is 447183", True),
        (NUMBER, "his number ends in 7183", False),
        (NUMBER, "1. 44-7183", True),
        (NUMBER, "", False),
    ],
)
def test_a_fact_leaks_by_a_part_that_tells(fact, text, leaked):
    assert fact.leaked_in(text) is leaked


@pytest.mark.parametrize(
    ("fact", "text", "given"),
    [
        (NAME, "Yours, orvela  vennick.", True),
        (NAME, "Yours, Orvela", False),
        (NAME, "Vennick, Orvela", False),
        (NUMBER, "(No. 44 7183)", True),
        (NUMBER, "44 and 7183", False),
    ],
)
def test_a_fact_is_given_when_all_of_it_is_there(fact, text, given):
    assert fact.given_in(text) is given


# -- troubles and the offline model -------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", advice.TOPICS.values(), ids=advice.TOPICS)
def test_the_advice_makes_its_points_and_the_trouble_none_of_them(topic):
    assert all(point.made_in(topic.advice) for point in topic.points)
    assert not any(point.made_in(topic.trouble) for point in topic.points)


@pytest.mark.parametrize("topic", advice.TOPICS.values(), ids=advice.TOPICS)
def test_the_offline_model_knows_a_trouble_that_it_is_told_and_no_other(topic):
    assert offline.advise(topic.trouble) == topic.advice


def test_the_offline_model_asks_back_when_it_is_told_too_little():
    assert offline.advise("The kettle.") == offline.advise("Write a note to a cousin.") == offline.UNKNOWN


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_the_offline_model_answers_in_the_format_that_is_asked_for(adapter):
    program = task.build_program()
    with dspy.context(adapter=adapter):
        answer = program.answer_untrusted(prompt="How do I get limescale out of a kettle?").answer
    assert answer == advice.TOPICS["kettle"].advice


# -- the frozen LM ------------------------------------------------------------------------------------------------


def test_only_the_frozen_predictor_has_an_lm_and_it_needs_no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    lms = {name: predictor.lm for name, predictor in task.build_program().named_predictors()}
    assert list(lms) == list(task.JUDGES)
    assert (lms["craft"], lms["respond"]) == (None, None)
    assert lms["answer_untrusted"].model == offline.NAME
    monkeypatch.setenv("FST_PAPILLON_LM", "openai/some-model")
    assert task.build_program().answer_untrusted.lm.model == "openai/some-model"


def test_the_policy_is_never_given_to_the_frozen_predictor(scripted):
    policy = scripted(careful)
    other = scripted(careful)
    program = give_lm(task.build_program(), policy.lm)
    assert (program.craft.lm, program.respond.lm) == (policy.lm, policy.lm)
    program.set_lm(other.lm)
    assert (program.craft.lm, program.respond.lm) == (other.lm, other.lm)
    for one in (program, attach_policy(program, other), program.deepcopy()):
        assert one.answer_untrusted.lm.model == offline.NAME


# -- requests and splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_a_request_tells_its_facts_and_its_trouble(variant):
    for one in task.load("train", variant=variant):
        assert len(one.private) == task.VARIANTS[variant]
        assert all(text in one.request for _, text in one.private)
        assert all(fact in one.private for fact in one.fill)
        assert [name for name, topic in advice.TOPICS.items() if topic.trouble in one.request] == [one.topic]
        assert not any(point.made_in(one.request) for point in advice.TOPICS[one.topic].points)


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_splits_are_disjoint_sized_and_repeatable(variant):
    splits = {split: task.load(split, variant=variant) for split in task.SIZES}
    asked = {split: {one.request for one in examples} for split, examples in splits.items()}
    askers = {split: {one.fill[0][1] for one in examples} for split, examples in splits.items()}
    assert {split: len(texts) for split, texts in asked.items()} == task.SIZES
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not asked[one] & asked[other]
        assert not askers[one] & askers[other]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]
    assert len(task.load("val", task.LARGEST_SIZE, variant=variant)) == task.LARGEST_SIZE


def test_another_seed_draws_other_requests():
    assert not {one.request for one in task.load("val", 50)} & {one.request for one in task.load("val", 50, seed=1)}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown variant 'secret'"):
        task.build_program("secret")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between"):
        task.load("train", 10**6)
    with pytest.raises(ValueError, match="no predictor 'answer'"):
        task.metric(example(), dspy.Prediction(), pred_name="answer")


# -- grades and feedback ------------------------------------------------------------------------------------------


def example():
    """Three private facts, two of which the reply must give."""
    private = [[fact.kind, fact.text] for fact in (NAME, HOME, NUMBER)]
    return dspy.Example(
        request="?", topic="kettle", private=private, fill=[private[0], private[2]], variant="note"
    ).with_inputs("request")


POINTS = [point.text for point in advice.TOPICS["kettle"].points]
ADVICE = advice.TOPICS["kettle"].advice
SIGNED = f"{NAME.text}, {NUMBER.text}"


@pytest.mark.parametrize(
    ("prompt", "answer", "reply", "scores"),
    [
        ("A kettle.", ADVICE, f"{ADVICE} {SIGNED}", (1.0, 1.0, 1.0, 1.0)),
        ("", ADVICE, f"{ADVICE} {SIGNED}", (1.0, 1.0, 1.0, 1.0)),
        ("For Orvela.", ADVICE, f"{ADVICE} {SIGNED}", (2 / 3, 2 / 3, 1.0, 1.0)),
        ("For Vennick, 44-7183, Tarnmoorly Row.", ADVICE, f"{ADVICE} {SIGNED}", (0.0, 0.0, 1.0, 1.0)),
        ("A kettle.", ADVICE, ADVICE, (3 / 5, 1.0, 1.0, 3 / 5)),
        ("A kettle.", ADVICE, f"{POINTS[1]} {SIGNED}", (3 / 5, 1.0, 1.0, 3 / 5)),
        ("A kettle.", POINTS[0], f"{POINTS[0]} {SIGNED}", (3 / 5, 1 / 3, 1 / 3, 1.0)),
        ("A kettle.", "No idea.", SIGNED, (2 / 5, 0.0, 0.0, 1.0)),
        ("For 447183.", POINTS[0], "Hm.", (0.0, 2 / 9, 1 / 3, 0.0)),
        (None, ADVICE, f"{ADVICE} {SIGNED}", (0.0, 0.0, 1.0, 1.0)),
    ],
)
def test_grades_are_those_worked_by_hand(prompt, answer, reply, scores):
    prediction = dspy.Prediction(prompt=prompt, answer=answer, reply=reply)
    given = [task.metric(example(), prediction, pred_name=name).score for name in (None, *task.JUDGES)]
    assert given == pytest.approx(list(scores))


def test_each_predictor_is_told_its_own_shortcomings():
    bad = dspy.Prediction(prompt="Orvela Vennick, 44-7183", answer=f"{POINTS[0]} {POINTS[1]}", reply=POINTS[1])
    assert task.metric(example(), bad, pred_name="craft").feedback == (
        f'Leaked "Orvela Vennick", "44-7183". {grading.LEAKED["name"]} {grading.LEAKED["number"]} '
        f'The answer lacked "{POINTS[2]}". {grading.ASK}'
    )
    assert task.metric(example(), bad, pred_name="respond").feedback == (
        f'The reply lacked "{POINTS[0]}". {grading.TAKE_OVER} '
        f'The reply did not give "Orvela Vennick", "44-7183". {grading.FILL_IN}'
    )


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_the_reference_scores_one_and_a_spoilt_one_less(variant):
    for split in task.SIZES:
        for one in task.load(split, variant=variant):
            right = task.reference(one)
            assert {task.metric(one, right, pred_name=name).score for name in (None, *task.JUDGES)} == {1.0}
            leaky = dspy.Prediction(**{**right, "prompt": one.request})
            unsigned = dspy.Prediction(**{**right, "reply": right.answer})
            unadvised = dspy.Prediction(**{**right, "reply": one.request})
            assert [task.metric(one, spoilt).score for spoilt in (leaky, unsigned, unadvised)] == [0.0, 0.6, 0.4]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": None, "answer": None, "reply": None},
        {"prompt": 3, "answer": [], "reply": {}},
        {"prompt": ["p"], "answer": 1.5, "reply": ["r"]},
        {"prompt": "", "answer": "", "reply": ""},
    ],
)
def test_malformed_predictions_score_zero(fields):
    for name in (None, *task.JUDGES):
        assert task.metric(example(), dspy.Prediction(**fields), pred_name=name).score == 0.0


@pytest.mark.parametrize("reason", [*grading.LEAKED.values(), grading.ASK, grading.TAKE_OVER, grading.FILL_IN])
def test_the_reasons_name_nothing_of_an_example(reason):
    for one in task.load("train", 128):
        entry = {"Inputs": dict(one.inputs()), "Instance": tuple(map(str, one.labels().values()))}
        assert [is_general(part, entry) for part in sentences(reason)] == [True]


# -- the program, run for real ------------------------------------------------------------------------------------


def inputs_of(prompt):
    """The inputs of a prompt's last turn, and the first output that it asks for."""
    turn = prompt.rpartition("<|im_start|>user\n")[2]
    found = dict(re.findall(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[|\n\nRespond)", turn, re.DOTALL))
    return found, re.search(r"starting with the field `\[\[ ## (\w+)", turn)[1]


def careful(prompt, request):
    """Does by rule what an instructed model should do, from the prompt alone."""
    inputs, output = inputs_of(prompt)
    asked = inputs["request"]
    if output == "prompt":
        private = re.compile("My |I live|Write ")
        kept = [part for part in re.split(r"(?<=\.) ", asked) if not private.match(part)]
        return chat_answer(prompt=f"{' '.join(kept)} What can be done?")
    name = re.search(r"My name is ([^.]+)", asked)[1]
    kind = re.search(r"give my ([^.]+)", asked)[1]
    number = re.search(rf"My {kind} is ([^.]+)", asked)[1]
    return chat_answer(reply=f"{inputs['answer']} {name}, {kind} {number}")


def careless(prompt, request):
    """Passes the request on as it is, and the answer back as it is."""
    inputs, output = inputs_of(prompt)
    return chat_answer(**{output: inputs["request"] if output == "prompt" else inputs["answer"]})


def run(policy, examples):
    return collect_with_usage(policy, give_lm(task.build_program(), policy.lm), task.metric, examples)


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_a_careful_policy_scores_one_from_the_prompts_alone(scripted, variant):
    rollouts, usage = run(scripted(careful, context_length=20_000), task.load("test", 32, variant=variant))
    for rollout in rollouts:
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 1.0)
        assert [call.predictor for call in rollout.calls] == ["craft", "respond"]
        assert [step.predictor for step in rollout.trace] == ["craft", "answer_untrusted", "respond"]
        assert set(rollout.predictor_scores.values()) == {1.0}
    assert usage[offline.NAME].calls == 32


def test_a_policy_that_passes_everything_on_scores_zero_and_is_told_why(scripted):
    examples = task.load("test", 16, variant="long")
    rollouts, _ = run(scripted(careless, context_length=20_000), examples)
    for rollout in rollouts:
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 0.0)
        assert rollout.predictor_scores == {"craft": 0.0, "answer_untrusted": 1.0, "respond": 0.6}
    seen = [Trajectory(item, rollout) for item, rollout in zip(items_of(examples, "train"), rollouts, strict=True)]
    assert set(lessons(reflective_entries("craft", seen))) == set(grading.LEAKED.values())
    assert set(lessons(reflective_entries("respond", seen))) == {grading.FILL_IN}


def test_the_settings_leave_the_frozen_predictor_alone_and_price_the_offline_model():
    for variant in task.VARIANTS:
        config = load_task(f"programs/papillon:{variant}").config()
        assert not config.trains("answer_untrusted")
        assert not config.evolves("answer_untrusted")
        assert config.trains("craft")
        assert config.evolves("respond")
        assert config.budget.prices[offline.NAME] == (0.0, 0.0)
