"""The tool agent: its tools, its questions, grades worked by hand, and the agent run for real."""

import re
import sys

import dspy
import pytest

from fst_optimizer.evolve.extractive import is_general, lessons, sentences
from fst_optimizer.evolve.gepa_adapter import Trajectory, reflective_entries
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Outcome, items_of
from helpers.collecting import collect

task = load_task("programs/tool_agent").module
goods, tools, questions, grading = (
    sys.modules[f"{task.__package__}.{name}"] for name in ("goods", "tools", "questions", "grading")
)


# -- tools --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 * (12.5 + 4)", 49.5),
        ("-2 ** 2", -4.0),
        ("+7 - -1", 8.0),
        ("1 / 3", 0.333333),
        ("10 ** -2", 0.01),
        ("0.1 + 0.2", 0.3),
        (" 2\t", 2.0),
        ("1_000 * 2", 2000.0),
        ("10 ** 12", 1e12),
        ("-" * 150 + "1", 1.0),
    ],
)
def test_the_calculator_calculates_as_worked_by_hand(expression, value):
    assert tools.calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "is no calculation"),
        ("12 coins", "is no calculation"),
        ("1 = 1", "is no calculation"),
        ("1;2", "is no calculation"),
        ("(" * 190 + "1", "is no calculation"),
        ("1,000", "cannot be calculated"),
        ("price * 2", "cannot be calculated"),
        ("__import__('os').getcwd()", "cannot be calculated"),
        ("[1][0]", "cannot be calculated"),
        ("'a' * 3", "cannot be calculated"),
        ("7 // 2", "cannot be calculated"),
        ("7 % 2", "cannot be calculated"),
        ("1 < 2", "cannot be calculated"),
        ("~1", "cannot be calculated"),
        ("2j", "cannot be calculated"),
        ("True + 1", "is not a number"),
        ("1 / (2 - 2)", "divides by zero"),
        ("9 ** 9 ** 9", "the power"),
        ("1e12 ** 64", "too large"),
        ("2 ** 41", "leaves the numbers"),
        ("1e400", "leaves the numbers"),
        ("1e12 + 1e12 - 1e12", "leaves the numbers"),
        ("(-8) ** 0.5", "leaves the numbers"),
        ("1+" * 100 + "1", "201 characters"),
    ],
)
def test_the_calculator_refuses_what_is_not_bounded_arithmetic(expression, reason):
    with pytest.raises(ValueError, match=reason):
        tools.calculator(expression)


def test_the_lookup_knows_every_good_and_maker_in_any_case():
    assert len(goods.records()) == 80 + 8
    for row in (*goods.goods(), *goods.makers().values()):
        assert tools.lookup(f" {row.name.upper()} ") == row.record()


def test_a_record_reads_as_written_by_hand():
    good = goods.Good("brindle lamp", 12.5, 3.0, 14, "Ovrik")
    assert good.record() == "brindle lamp: price 12.5 coins, weight 3 ounces, stock 14 pieces, maker Ovrik"
    assert goods.Maker("Ovrik", 8).record() == "Ovrik: rebate 8 per cent on its goods"


@pytest.mark.parametrize("name", ["", "lamp", "brindle lantern, brindle kettle"])
def test_the_lookup_raises_on_unknown_names(name):
    with pytest.raises(ValueError, match="nothing is called"):
        tools.lookup(name)


# -- questions and splits -----------------------------------------------------------------------------------------


def test_answers_are_those_worked_by_hand():
    maker = next(iter(goods.makers()))
    rebate = goods.makers()[maker].rebate
    chosen = (
        goods.Good("a", 2.5, 1.5, 20, maker),
        goods.Good("b", 4.0, 10.0, 30, maker),
        goods.Good("c", 1.0, 0.5, 30, maker),
    )
    answers = {
        lookups: [questions.ask(one, chosen[: one.goods], (4, 3, 2)[: one.goods]).answer for one in templates]
        for lookups, templates in questions.TEMPLATES.items()
    }
    assert answers == {
        1: [4 * 2.5, 4 * 1.5, 16 * 2.5],
        2: [10 + 12, 6 - 30, 10 - rebate / 10],
        3: [6 + 30 + 1, round(24 / 9, 6), 10 - rebate / 10 + 12],
    }


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_a_question_needs_as_many_look_ups_as_its_variant_says(variant):
    for one in task.load("train", variant=variant):
        assert len(one.names) == task.VARIANTS[variant]
        asked = [name for name in one.names if name in one.question]
        assert len(asked) == len(one.names) - ("rebate" in one.question), "a maker's name is in a record only"


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_splits_are_disjoint_sized_and_repeatable(variant):
    splits = {split: task.load(split, variant=variant) for split in task.SIZES}
    asked = {split: {one.question for one in examples} for split, examples in splits.items()}
    about = {
        split: {frozenset(set(one.names) - set(goods.makers())) for one in examples}
        for split, examples in splits.items()
    }
    assert {split: len(texts) for split, texts in asked.items()} == task.SIZES
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not asked[one] & asked[other]
        assert not about[one] & about[other]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]
    assert len(task.load("val", task.LARGEST_SIZE, variant=variant)) == task.LARGEST_SIZE


def test_another_seed_draws_other_questions():
    assert {one.question for one in task.load("val", 50)} != {one.question for one in task.load("val", 50, seed=1)}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown variant '4-lookup'"):
        task.build_program("4-lookup")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between"):
        task.load("train", 10**6)
    with pytest.raises(ValueError, match="no predictor 'extract'"):
        task.metric(task.load("val", 1)[0], dspy.Prediction(), pred_name="extract")


# -- grades and feedback ------------------------------------------------------------------------------------------

GOOD = goods.goods()[0]
MAKER = goods.makers()[GOOD.maker]


def example():
    """Two look-ups: a good, and its maker for the rebate."""
    return dspy.Example(question="?", answer=12.5, names=[GOOD.name, MAKER.name], variant="2-lookup").with_inputs(
        "question"
    )


def ran(*turns, answer=0.0):
    """The prediction of an agent with these (tool, observation) turns."""
    trajectory = {}
    for place, (tool, observation) in enumerate(turns):
        trajectory |= {f"tool_name_{place}": tool, f"tool_args_{place}": {}, f"observation_{place}": observation}
    return dspy.Prediction(trajectory=trajectory, answer=answer)


SEEN = (("lookup", GOOD.record()), ("lookup", MAKER.record()))
DONE = ("finish", "Completed.")


@pytest.mark.parametrize(
    ("prediction", "score", "react", "extract"),
    [
        (ran(*SEEN, ("calculator", 12.5), DONE, answer=12.5), 1.0, 1.0, 1.0),
        (ran(answer=12.495), 1.0, 1.0, 1.0),
        (ran(*SEEN, ("calculator", 12.5), DONE, answer=12.0), 0.45, 1.0, 0.0),
        (ran(*SEEN, ("calculator", 12.0), DONE, answer=12.0), 0.3, 0.5, 0.3),
        (ran(SEEN[0], DONE), 0.15, 0.25, 0.15),
        (ran(("calculator", 12.5), DONE), 0.15, 0.5, 0.0),
        (ran(DONE), 0.0, 0.0, 0.0),
    ],
)
def test_grades_are_those_worked_by_hand(prediction, score, react, extract):
    assert task.metric(example(), prediction).score == pytest.approx(score)
    assert task.metric(example(), prediction, pred_name="react").score == pytest.approx(react)
    assert task.metric(example(), prediction, pred_name="extract.predict").score == pytest.approx(extract)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(12.5, True), ("12.50", True), (12.48, False), (True, False), (float("nan"), False), ("12.5 coins", False)],
)
def test_an_answer_is_a_number_within_a_hundredth(answer, right):
    assert grading.near(answer, 12.5) is right


def test_one_is_right_but_true_is_not():
    assert grading.near(1, 1.0)
    assert not grading.near(True, 1.0)


def test_the_agent_is_told_what_it_left_out():
    broken = ran(("lookup", "Execution error in lookup: x"), ("calculator", "Execution error in calculator: x"))
    assert task.metric(example(), broken, pred_name="react").feedback == " ".join(
        [
            f'Never looked up: "{GOOD.name}", "{MAKER.name}".',
            grading.LOOK_UP,
            grading.REBATE,
            grading.ONE_NAME,
            grading.PLAIN_NUMBERS,
            f'"12.5" was never calculated. {grading.CALCULATE}',
            grading.END,
        ]
    )


def test_the_extraction_is_told_to_take_the_number_over():
    missed = ran(*SEEN, ("calculator", 12.5), DONE, answer=3.0)
    assert task.metric(example(), missed, pred_name="extract.predict").feedback == (
        f'Answered "3.0", although "12.5" had been calculated. {grading.TAKE_OVER}'
    )


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_the_reference_scores_one_and_a_spoilt_one_less_than_a_half(variant):
    for split in task.SIZES:
        for one in task.load(split, variant=variant):
            right = task.reference(one)
            assert task.metric(one, right).score == 1.0
            assert {task.metric(one, right, pred_name=name).score for name in task.JUDGES} == {1.0}
            for wrong in (one.answer + 1, -one.answer - 1, None):
                assert 0 < task.metric(one, dspy.Prediction(**{**right, "answer": wrong})).score < 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trajectory": None, "answer": None},
        {"trajectory": "looked it up", "answer": "twelve"},
        {"trajectory": {}, "answer": ""},
        {"trajectory": {"tool_name_0": 3, "observation_7": []}, "answer": [12.5]},
        {"trajectory": {1: 2, "tool_name_x": "lookup"}, "answer": float("inf")},
    ],
)
def test_malformed_predictions_score_zero(fields):
    for name in (None, *task.JUDGES):
        assert task.metric(example(), dspy.Prediction(**fields), pred_name=name).score == 0.0


REASONS = ("LOOK_UP", "REBATE", "ONE_NAME", "PLAIN_NUMBERS", "CALCULATE", "END", "TAKE_OVER")


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("tool", ["lookup", "calculator", "finish"])
def test_the_reasons_name_nothing_of_an_example_nor_a_tool(reason, tool):
    for one in task.load("train", 64):
        outputs = {"next_tool_name": tool}
        labels = tuple(map(str, one.labels().values()))
        entry = {"Inputs": dict(one.inputs()), "Generated Outputs": outputs, "Instance": labels}
        assert [is_general(part, entry) for part in sentences(getattr(grading, reason))] == [True]


# -- the agent, run for real --------------------------------------------------------------------------------------


def inputs_of(prompt):
    """The inputs of a prompt's last turn, and the first output that it asks for."""
    turn = prompt.rpartition("<|im_start|>user\n")[2]
    found = dict(re.findall(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[|\n\nRespond)", turn, re.DOTALL))
    return found, re.search(r"starting with the field `\[\[ ## (\w+)", turn)[1]


def call(tool, **arguments):
    written = ", ".join(f'"{name}": "{value}"' for name, value in arguments.items())
    return chat_answer(next_thought="so", next_tool_name=tool, next_tool_args=f"{{{written}}}")


def observed(turn_text, tool):
    """What this tool returned so far, by the trajectory in the prompt."""
    turn = turn_text.rpartition("<|im_start|>user\n")[2]
    found = re.findall(r"\[\[ ## tool_name_(\d+) ## \]\]\n(\w+)\n", turn)
    return [
        re.search(rf"\[\[ ## observation_{place} ## \]\]\n(.*?)\n\n", turn, re.DOTALL)[1]
        for place, name in found
        if name == tool
    ]


def agent(examples, *, before=()):
    """Looks up what the question needs, calculates, ends and answers; first makes the calls of `before`."""
    by_question = {one.question: one for one in examples}

    def answer(prompt, request):
        inputs, output = inputs_of(prompt)
        one = by_question[inputs["question"]]
        if output == "reasoning":
            return chat_answer(reasoning="so", answer=observed(prompt, "calculator")[-1])
        made = prompt.rpartition("<|im_start|>user\n")[2].count("[[ ## tool_name_")
        looked_up = [("lookup", {"name": name}) for name in one.names]
        calls = [*before, *looked_up, ("calculator", {"expression": f"{one.answer} * 2 / 2"}), ("finish", {})]
        tool, arguments = calls[made]
        return call(tool, **arguments)

    return answer


def test_the_predictors_have_the_names_that_the_metric_knows():
    assert [name for name, _ in task.build_program().named_predictors()] == list(task.JUDGES)


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_an_agent_that_makes_the_right_calls_scores_one(scripted, variant):
    examples = task.load("test", 8, variant=variant)
    policy = scripted(agent(examples), context_length=50_000)
    for rollout in collect(policy, task.build_program(), task.metric, examples):
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 1.0)
        turns = task.VARIANTS[variant] + 2
        assert [one.predictor for one in rollout.calls] == ["react"] * turns + ["extract.predict"]
        assert rollout.predictor_scores == {"react": 1.0, "extract.predict": 1.0}


def test_tools_that_raise_are_shown_to_the_agent_which_may_go_on(scripted):
    examples = task.load("test", 4)
    before = [
        ("lookup", {"name": "no such thing"}),
        ("calculator", {"expression": "2 coins"}),
        ("lookup", {"nam": "x"}),
    ]
    policy = scripted(agent(examples, before=before), context_length=80_000)
    for rollout in collect(policy, task.build_program(), task.metric, examples):
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 1.0)
        trajectory = rollout.trace[-1].inputs["trajectory"]
        assert "Execution error in lookup" in trajectory
        assert "nothing is called 'no such thing'" in trajectory
        assert "'2 coins' is no calculation" in trajectory
        assert "Arg nam is not in the tool's args" in trajectory


def test_an_unknown_tool_is_a_parse_error(scripted):
    examples = task.load("test", 2)
    policy = scripted(agent(examples, before=[("oracle", {"question": "x"})]), context_length=50_000)
    for rollout in collect(policy, task.build_program(), task.metric, examples):
        assert (rollout.outcome, rollout.score) == (Outcome.PARSE_ERROR, 0.0)
        assert [one.predictor for one in rollout.calls] == ["react"]


def test_an_agent_that_never_ends_is_stopped_and_told_so(scripted):
    examples = [one for one in task.load("test", 64) if "rebate" in one.question][:8]

    def restless(prompt, request):
        _, output = inputs_of(prompt)
        return chat_answer(reasoning="so", answer=1) if output == "reasoning" else call("lookup", name="everything")

    rollouts = collect(scripted(restless, context_length=100_000), task.build_program(), task.metric, examples)
    for rollout in rollouts:
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 0.0)
        assert [one.predictor for one in rollout.calls] == ["react"] * task.MAX_TURNS + ["extract.predict"]
    seen = [Trajectory(item, rollout) for item, rollout in zip(items_of(examples, "train"), rollouts, strict=True)]
    learned = lessons(reflective_entries("react", seen))
    assert {grading.LOOK_UP, grading.REBATE, grading.ONE_NAME, grading.CALCULATE, grading.END} <= set(learned)


def test_an_agent_that_calculates_right_and_answers_wrong_earns_less_than_a_half(scripted):
    examples = task.load("test", 4)
    honest = agent(examples)

    def confused(prompt, request):
        _, output = inputs_of(prompt)
        return chat_answer(reasoning="so", answer=-1) if output == "reasoning" else honest(prompt, request)

    for rollout in collect(scripted(confused, context_length=50_000), task.build_program(), task.metric, examples):
        assert rollout.score == pytest.approx(0.45)
        assert rollout.predictor_scores == {"react": 1.0, "extract.predict": 0.0}


def test_the_settings_are_valid_for_every_variant():
    for variant in task.VARIANTS:
        assert load_task(f"programs/tool_agent:{variant}").config().rollout.batch_size == 16
