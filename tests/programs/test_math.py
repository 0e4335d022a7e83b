"""The math task: answers worked by hand, math-verify's verdicts, grades, splits, real data, and the sandbox."""

import copy
import importlib.util
import json
import math
import sys
import threading
from fractions import Fraction
from pathlib import Path

import dspy
import pytest

from fst_optimizer.evolve.extractive import is_general, sentences
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from helpers.collecting import collect

pytest.importorskip("math_verify", reason="answers are checked by math-verify")

TASK = load_task("programs/math")
task = TASK.module
problems = sys.modules[task.FAMILIES["clock"].__class__.__module__]


def predict(result="", answer=""):
    return dspy.Prediction(reasoning="", result=result, answer=answer)


def example(answer="12", source="made/clock"):
    return dspy.Example(problem="What is it?", answer=answer, source=source).with_inputs("problem")


# --- Problems --------------------------------------------------------------------------------------------------------


HAND_WORKED = [
    ("discount", {"price": 200, "off": 10, "tax": 5}, "189"),
    ("discount", {"price": 100, "off": 5, "tax": 3}, r"\frac{1957}{20}"),
    ("growth", {"start": 200, "percent": 50, "years": 2}, "250"),
    ("mixture", {"volume": 6, "weak": 20, "strong": 50, "target": 40}, "12"),
    ("shared_work", {"a": 2, "b": 3, "c": 6}, "1"),
    ("mean_speed", {"there": 20, "back": 30, "distance": 60}, "24"),
    ("two_equations", {"a": 1, "b": 1, "c": 3, "d": 1, "e": -1, "f": 1}, "(2, 1)"),
    ("two_equations", {"a": 2, "b": 1, "c": 1, "d": 2, "e": -1, "f": 2}, r"(\frac{3}{4}, -\frac{1}{2})"),
    ("quadratic", {"double": 6, "q": 4}, r"3 + \sqrt{5}"),
    ("quadratic", {"double": 6, "q": 5}, "5"),
    ("root_squares", {"b": 5, "c": 6}, "13"),
    ("root_inverses", {"a": 2, "b": 7, "c": 3}, r"\frac{7}{3}"),
    ("surds", {"a": 2, "k": 5, "m": 3, "n": 4}, r"4\sqrt{2}"),
    ("diagonal", {"a": 2, "b": 3, "c": 6}, "7"),
    ("diagonal", {"a": 2, "b": 2, "c": 2}, r"2\sqrt{3}"),
    ("sector", {"radius": 6, "angle": 60}, r"6\pi"),
    ("cone", {"radius": 3, "height": 4, "cut": 2}, r"\frac{21\pi}{2}"),
    ("triangle", {"a": 0, "b": 0, "c": 4, "d": 0, "e": 0, "f": 3}, "6"),
    ("clock", {"hour": 3, "minute": 30}, "75"),
    ("clock", {"hour": 11, "minute": 10}, "85"),
    ("series", {"first": 1, "step": 2, "n": 12}, "144"),
    ("infinite_series", {"first": 3, "p": 1, "q": 2}, "2"),
    ("recurrence", {"first": 1, "factor": 2, "plus": 1, "n": 5}, "31"),
    ("committee", {"a": 4, "b": 4, "size": 3}, "48"),
    ("flags", {"a": 2, "b": 2, "c": 2}, "90"),
    ("urn", {"a": 2, "b": 2, "c": 2}, r"\frac{1}{5}"),
    ("grid", {"width": 2, "height": 2, "x": 1, "y": 1}, "2"),
    ("divisible", {"n": 100, "a": 4, "b": 6}, "25"),
    ("power_remainder", {"base": 2, "exponent": 10, "modulus": 7}, "2"),
    ("zeros", {"n": 100, "m": 25}, "18"),
    ("exponents", {"a": 1, "b": 1, "c": 1, "d": 1}, "5"),
]


@pytest.mark.parametrize(("family", "chosen", "answer"), HAND_WORKED)
def test_families_answer_as_worked_by_hand(family, chosen, answer):
    text, made = task.FAMILIES[family].pose(**chosen)
    assert made == answer
    assert "{a}" not in text


def test_every_family_is_worked_by_hand_and_there_are_at_least_fifteen():
    assert {family for family, _, _ in HAND_WORKED} == set(task.FAMILIES)
    assert len(task.FAMILIES) >= 15


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (Fraction(-5, 6), r"-\frac{5}{6}"), (Fraction(8, 4), "2"), (r"3\pi", r"3\pi")],
)
def test_values_are_written_in_latex(value, text):
    assert problems.latex(value) == text


@pytest.mark.parametrize(("square", "factor", "text"), [(12, 1, r"2\sqrt{3}"), (9, 1, "3"), (7, 1, r"\sqrt{7}")])
def test_roots_are_simplified(square, factor, text):
    assert problems.root(square, factor) == text


def test_the_same_parameters_are_always_posed_in_the_same_words():
    chosen = {"price": 52, "off": 20, "tax": 5}
    assert len({task.FAMILIES["discount"].pose(**chosen)[0] for _ in range(20)}) == 1


# --- The folder's name -----------------------------------------------------------------------------------------------


def test_the_folder_does_not_shadow_the_standard_library():
    assert task.__name__.startswith("fst_task_math_")
    assert sys.modules["math"] is math
    assert math.isqrt(17) == 4
    assert Path(task.__file__).parent.name == "math"


# --- math-verify -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("12", r"\boxed{12}"),
        (r"\frac{5}{6}", r"\boxed{5/6}"),
        ("5/6", r"\boxed{\dfrac{10}{12}}"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        (r"\frac{5\pi}{3}", r"\boxed{5\pi/3}"),
        (r"3 + \sqrt{5}", r"\boxed{\frac{6+2\sqrt{5}}{2}}"),
        (r"(\frac{1}{2}, -3)", r"\boxed{(0.5, -3)}"),
        ("1234", r"\boxed{1,234}"),
        ("12", r"\boxed{x = 12}"),
        ("$12$", r"$\boxed{12}$"),
    ],
)
def test_equal_values_in_other_forms_score_one(expected, answer):
    assert task.grade_answer(expected, answer) == 1.0


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ("12", r"\boxed{13}", 0.1),
        ("12", r"\boxed{1, 12}", 0.1),
        ("(3, 2)", r"\boxed{(2, 3)}", 0.1),
        (r"\frac{5}{6}", r"\boxed{0.83}", 0.1),
        (r"\frac{5}{6}", r"\frac{5}{6}", 0.5),
        ("12", "The answer is 12", 0.5),
        ("12", r"It is \boxed{12}", 0.5),
        ("12", r"\boxed{12} or \boxed{13}", 0.0),
        ("12", "13", 0.0),
        ("12", r"\boxed{}", 0.0),
        ("12", "\\boxed{", 0.0),
        ("12", "no idea", 0.0),
        ("12", "", 0.0),
        ("12", None, 0.0),
        ("12", 12, 0.0),
        ("12", ["12"], 0.0),
    ],
)
def test_other_answers_score_less(expected, answer, score):
    assert task.grade_answer(expected, answer) == score


@pytest.mark.parametrize(
    ("result", "score"), [("12", 1.0), (r"\boxed{12}", 1.0), ("x = 12", 1.0), ("13", 0.1), ("none", 0.1), ("", 0.0)]
)
def test_a_result_needs_no_box(result, score):
    assert task.grade_result("12", result) == score


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        (r"\boxed{12}", True),
        (r" $\boxed{\frac{1}{2}}$. ", True),
        (r"\[\boxed{12}\]", True),
        (r"$\boxed{12}.$", True),
        (r"\boxed{12} hours", False),
        (r"\boxed{1}\boxed{2}", False),
        (r"\boxed{\boxed{2}}", False),
        (r"\boxed{12", False),
        ("$", False),
        ("12", False),
    ],
)
def test_an_answer_is_alone_in_one_box(text, alone):
    assert task.is_alone(text) is alone


def test_answers_are_checked_from_worker_threads():
    scores = []

    def check(number):
        scores.append((number, task.grade_answer(str(number % 3), rf"\boxed{{{number}}}")))

    threads = [threading.Thread(target=check, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(scores) == [(number, 1.0 if number < 3 else 0.1) for number in range(12)]


def test_math_verify_alone_agrees_with_every_family():
    from math_verify import parse, verify

    for family in task.FAMILIES:
        for one in task.load("test", 3, variant=family):
            gold = parse(rf"\boxed{{{one.answer}}}", fallback_mode="no_fallback")
            assert gold, one
            assert verify(gold, parse(task.reference(one).answer, fallback_mode="no_fallback")), one
            assert not verify(gold, parse(r"\boxed{123456789}", fallback_mode="no_fallback")), one


def test_an_answer_that_computes_for_ever_is_wrong_and_the_next_is_checked(monkeypatch):
    monkeypatch.setattr(task, "CHECK_CPU_S", 0.5)
    assert task.grade_answer("12", r"\boxed{9^{9^{9^{9}}}}") == 0.0
    assert task.grade_answer("12", r"\boxed{11+1}") == 1.0


# --- Scores and feedback ---------------------------------------------------------------------------------------------


def test_every_example_of_the_three_splits_scores_one_by_its_reference_and_less_by_another_answer():
    for split in task.SPLITS:
        for one in TASK.load(split, 100):
            right = task.reference(one)
            assert task.metric(one, right).score == 1.0
            assert task.metric(one, predict(one.answer, r"\boxed{123456789}")).score == 0.1
            assert task.metric(one, predict(one.answer, one.answer)).score == 0.5


def test_the_programs_score_is_the_final_answers_and_each_predictor_has_its_own():
    found = task.metric(example(), predict("12", r"\boxed{13}"))
    assert found.score == 0.1
    assert found.feedback.splitlines()[0] == "solve.predict: Right."
    solve = task.metric(example(), predict("13", r"\boxed{12}"), None, "solve.predict", None)
    finish = task.metric(example(), predict("13", r"\boxed{12}"), None, "finish", None)
    assert (solve.score, finish.score, finish.feedback) == (0.1, 1.0, "Right.")
    assert solve.feedback == (
        'Got "13", expected "12". '
        "The value is wrong: check every step, and test the result against each condition of the problem. "
        "The hour hand moves on during the hour as well, by half a degree each minute."
    )


@pytest.mark.parametrize(
    ("result", "answer", "lesson"),
    [
        ("12", "12", "alone in one boxed command of LaTeX"),
        ("12", r"\boxed{13}", "Copy a result that the check confirms"),
        ("13", "14", "The value is wrong"),
        ("13", "who knows?!", "one short expression in LaTeX"),
        ("", "", "one short expression in LaTeX"),
        ("12.05", r"\boxed{12.05}", "Give exact values"),
    ],
)
def test_feedback_names_the_reason(result, answer, lesson):
    assert lesson in task.metric(example(), predict(result, answer), pred_name="finish").feedback


def test_every_lesson_can_be_taken_over_by_the_extractive_reflector():
    for family in task.FAMILIES:
        (one,) = task.load("train", 1, variant=family)
        feedback = task.metric(one, predict("123456789", r"\boxed{123456789}"), pred_name="finish").feedback
        entry = {"Inputs": one.inputs().toDict(), "Generated Outputs": {"answer": r"\boxed{123456789}"}}
        entry["Instance"] = tuple(str(value) for value in one.labels().values())
        general = [sentence for sentence in sentences(feedback) if is_general(sentence, entry)]
        assert len(general) == 2, (family, general)


@pytest.mark.parametrize("prediction", [dspy.Prediction(), predict(None, None), predict(["12"], {"a": 1}), predict()])
def test_malformed_predictions_score_zero(prediction):
    for name in (None, "solve.predict", "finish"):
        assert task.metric(example(), prediction, pred_name=name).score == 0.0


def test_an_unknown_predictor_is_refused():
    with pytest.raises(ValueError, match="no predictor 'third'"):
        task.metric(example(), dspy.Prediction(), pred_name="third")


# --- Splits and variants ---------------------------------------------------------------------------------------------


def test_splits_are_disjoint_sized_and_repeatable():
    splits = {split: TASK.load(split) for split in task.SIZES}
    texts = {split: {one.problem for one in examples} for split, examples in splits.items()}
    assert {split: len(found) for split, found in texts.items()} == task.SIZES
    assert not texts["train"] & texts["val"]
    assert not texts["train"] & texts["test"]
    assert not texts["val"] & texts["test"]
    assert TASK.load("test", 5) == splits["test"][:5]
    assert {one.source for one in splits["train"]} == {f"made/{family}" for family in task.FAMILIES}
    assert copy.deepcopy(splits["val"]) == splits["val"]


def test_another_seed_draws_other_problems_of_the_same_split():
    first = {one.problem for one in TASK.load("val", 60)}
    second = [one.problem for one in TASK.load("val", 60, seed=1)]
    assert set(second) != first
    assert {task.split_of(problem) for problem in second} == {"val"}


def test_a_family_is_a_variant_and_says_how_many_problems_it_has():
    assert {one.source for one in task.load("val", 8, variant="clock")} == {"made/clock"}
    with pytest.raises(ValueError, match=r"'clock' has only \d+ distinct problems in its val split, not 128"):
        task.load("val", variant="clock")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"split": "val", "size": 10**6}, "size must be between"),
        ({"split": "val", "variant": "clocks"}, "unknown variant 'clocks' of math; choose one of all, real, discount"),
        ({"split": "val", "variant": "clock,min=0.1"}, "only real data has a difficulty"),
        ({"split": "val", "variant": "real,low=0.1"}, "limit 'low=0.1'"),
        ({"split": "val", "variant": "real,min=3"}, "limit 'min=3'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        task.load(**arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        task.build_program()


def test_the_config_is_valid_and_no_model_is_named():
    assert TASK.config().train.gradient_checkpointing
    assert TASK.model() is None


# --- Real data -------------------------------------------------------------------------------------------------------


def polaris_rows(count=60):
    """Rows in the schema of Polaris, with problems of our own."""
    return [
        {
            "problem": f"What is ${n} + \\frac{{1}}{{2}}$?",
            "answer": rf"\frac{{{2 * n + 1}}}{{2}}",
            "difficulty": f"{n % 9}/8",
        }
        for n in range(count)
    ]


@pytest.fixture
def polaris(tmp_path, monkeypatch):
    """Points the variant `real` at rows on disk."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows, name="polaris.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setenv(task.DATA_VARIABLE, str(path))
        return path

    return write


def test_real_data_is_split_by_hash_and_scores_one_by_its_reference(polaris):
    polaris([*polaris_rows(), *polaris_rows(3), {"problem": "Open?", "answer": "", "difficulty": "1/8"}])
    splits = {split: task.load(split, variant="real") for split in task.SPLITS}
    texts = [one.problem for examples in splits.values() for one in examples]
    assert len(texts) == len(set(texts)) == 60
    assert all(task.split_of(one.problem) == split for split, examples in splits.items() for one in examples)
    assert all(task.metric(one, task.reference(one)).score == 1.0 for one in splits["test"])
    assert task.load("train", 4, variant="real") == splits["train"][:4]
    assert splits["train"][0].inputs().toDict().keys() == {"problem"}


def test_limits_keep_the_pass_rates_between_them(polaris):
    polaris(polaris_rows())
    kept = task.load("train", variant="real,min=0.25,max=0.5")
    rates = {row["problem"]: row["difficulty"] for row in polaris_rows()}
    assert kept
    assert {rates[one.problem] for one in kept} == {"2/8", "3/8", "4/8"}


def test_a_folder_and_a_saved_data_set_are_read_too(polaris, tmp_path, monkeypatch):
    import datasets

    polaris(polaris_rows(30))
    from_file = task.load("train", variant="real")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(polaris_rows(30)).save_to_disk(str(saved))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in polaris_rows(30)))
    for place in (saved, folder):
        monkeypatch.setenv(task.DATA_VARIABLE, str(place))
        assert task.load("train", variant="real") == from_file


def test_answers_that_are_words_are_compared_as_text(polaris):
    assert task.grade_answer("(C)", r"\boxed{(C)}") == 1.0
    assert task.grade_answer(r"\text{even}", r"\boxed{\text{odd}}") < 1.0


@pytest.mark.parametrize(("difficulty", "rate"), [("3/8", 0.375), ("0/8", 0.0), (0.5, 0.5), ("1", 1.0)])
def test_difficulties_are_shares(difficulty, rate):
    assert task.pass_rate(difficulty) == rate


@pytest.mark.parametrize("difficulty", ["hard", None, 7, "9/8", "1/0"])
def test_other_difficulties_are_refused(difficulty):
    with pytest.raises(ValueError, match="neither a share"):
        task.pass_rate(difficulty)


def test_real_data_that_is_not_there_is_refused(polaris, monkeypatch, tmp_path):
    monkeypatch.delenv(task.DATA_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="variant real reads the data that FST_MATH_DATA names: set it"):
        task.load("train", variant="real")
    for place, words in ((tmp_path / "none", "no such file or folder"), (tmp_path / "odd.txt", "suffix is '.txt'")):
        (tmp_path / "odd.txt").write_text("x")
        monkeypatch.setenv(task.DATA_VARIABLE, str(place))
        with pytest.raises(ValueError, match=words):
            task.load("train", variant="real")
    polaris([{"question": "1 + 1?", "answer": "2"}], name="other.jsonl")
    with pytest.raises(ValueError, match="no column problem, only question, answer"):
        task.load("train", variant="real")
    polaris(polaris_rows(5), name="few.jsonl")
    with pytest.raises(ValueError, match="problems in its train split"):
        task.load("train", 50, variant="real")


# --- End to end ------------------------------------------------------------------------------------------------------


def test_the_program_runs_with_right_and_with_wrong_answers(scripted):
    examples = TASK.load("val", 4)

    def right(prompt, request):
        one = next(one for one in examples if one.problem in prompt)
        answer = task.reference(one).answer if "[[ ## result ## ]]\n" + one.answer in prompt else "not told"
        return chat_answer(reasoning="so", result=one.answer, answer=answer)

    def wrong(prompt, request):
        return chat_answer(reasoning="so", result="123456789", answer=r"\boxed{123456789}")

    for rollout in collect(scripted(right), TASK.build_program(), TASK.metric, examples):
        assert (rollout.score, rollout.predictor_scores) == (1.0, {"solve.predict": 1.0, "finish": 1.0})
        assert [call.predictor for call in rollout.calls] == ["solve.predict", "finish"]
    for rollout in collect(scripted(wrong), TASK.build_program(), TASK.metric, examples):
        assert (rollout.score, rollout.predictor_scores) == (0.1, {"solve.predict": 0.1, "finish": 0.1})
        assert "The value is wrong" in rollout.feedback["finish"]
