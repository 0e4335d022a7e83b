"""The reasoning task: every data set's own scorer, splits of small and large spaces, fences, and the program."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import dspy
import pytest

from fst_optimizer.evolve.extractive import is_general, sentences
from fst_optimizer.task_kit import split_by_hash
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from helpers.collecting import collect

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the data sets are those of reasoning-gym")

from reasoning_gym.factory import DATASETS  # noqa: E402

TASK = load_task("programs/reasoning")
task = TASK.module
FOLDER = Path(task.__file__).parent
_spec = importlib.util.spec_from_file_location("reasoning_drawer", FOLDER / "drawer.py")
drawer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drawer)

SLOW = {"futoshiki", "knight_swap", "sokoban", "zebra_puzzles"}
"""Data sets that take more than a second for a few entries: left out here for time only."""
NO_REFERENCE = {"boxnet", "rush_hour"}
"""Data sets whose entries name no right answer, neither in `answer` nor in their metadata."""
LENIENT = {"fraction_simplification", "gsm_symbolic", "knights_knaves", "letter_jumble", "propositional_logic"}
"""Data sets whose own scorer gives 1.0 to the right answer said twice, with a word after it."""
TESTED = sorted(set(DATASETS) - set(drawer.REFUSED) - SLOW)


def predict(working="", answer=""):
    return dspy.Prediction(working=working, answer=answer)


def example(answer="-52", question="53 + 10 - 53 - 62 = ?", name="chain_sum"):
    entry = {"question": question, "answer": answer, "metadata": {}}
    made = dspy.Example(question=question, answer=answer, entry=repr(entry), variant=name)
    return made.with_inputs("question")


# --- All data sets ---------------------------------------------------------------------------------------------------


def test_data_sets_of_every_category_are_tested():
    kinds = {DATASETS[name][0].__module__.split(".")[1] for name in TESTED}
    assert len(TESTED) >= 20
    assert kinds >= {"algebra", "algorithmic", "arc", "arithmetic", "code", "cognition", "games", "geometry", "graphs"}
    assert kinds >= {"induction", "logic", "probability"}


@pytest.mark.parametrize("name", TESTED)
def test_the_reference_scores_one_and_other_answers_less(name):
    first, second = task.load("train", 2, variant=name)
    assert copy.deepcopy(first) == first
    assert json.loads(json.dumps(first.toDict())) == first.toDict()
    for one in (first, second):
        for answer in ("", "  ", None, 7, ["x"], "xyzzy", "((((", "[[", "\x00"):
            assert task.metric(one, predict("", answer)).score < 1.0, answer
    if name in NO_REFERENCE:
        assert (first.answer, second.answer) == ("", "")
        with pytest.raises(ValueError, match="names no right answer"):
            task.reference(first)
        return
    for one in (first, second):
        assert task.metric(one, task.reference(one)).score == 1.0
        for predictor in ("solve", "answer"):
            assert task.metric(one, task.reference(one), pred_name=predictor).score == 1.0
    doubled = [task.metric(one, predict("", f"{one.answer} {one.answer} xyzzy")).score for one in (first, second)]
    assert (max(doubled) == 1.0) is (name in LENIENT)


def test_the_refused_data_sets_are_refused_for_the_reason_given():
    halting = reasoning_gym.create_dataset("game_of_life_halting", seed=0, size=4)
    assert {halting.score_answer(text, halting[0]) for text in ("True", "False", "xyzzy")} == {1.0}
    with pytest.raises(ValueError, match=r"its own scorer gives 1\.0 to any text"):
        task.build_program("game_of_life_halting")
    with pytest.raises(AssertionError, match="at least one dataset"):
        reasoning_gym.create_dataset("composite", seed=0, size=4)
    with pytest.raises(ValueError, match="it is a mixture"):
        task.build_program("composite")


def test_metadata_that_is_no_literal_becomes_one():
    import numpy

    value = {"a": numpy.float64(0.5), 3: (numpy.array([1, 2]), frozenset({"x"})), "b": [None, True], "c": Path("p")}
    assert drawer._plain(value) == {"a": 0.5, 3: ([1, 2], {"x"}), "b": [None, True], "c": "p"}


# --- Questions and splits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "chain_sum,min_terms=2,max_terms=3,max_digits=2", "calendar_arithmetic"])
def test_splits_are_disjoint_sized_and_repeatable(variant):
    splits = {
        split: task.load(split, size, variant=variant) for split, size in (("train", 90), ("val", 40), ("test", 50))
    }
    texts = {split: {one.question for one in examples} for split, examples in splits.items()}
    assert {split: len(found) for split, found in texts.items()} == {"train": 90, "val": 40, "test": 50}
    assert not texts["train"] & texts["val"]
    assert not texts["train"] & texts["test"]
    assert not texts["val"] & texts["test"]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]


def test_the_default_sizes_can_be_drawn_from_the_default_data_set():
    assert {split: len(TASK.load(split)) for split in task.SIZES} == task.SIZES


def test_another_seed_draws_other_questions_of_the_same_split():
    first = {one.question for one in TASK.load("val", 40)}
    second = [one.question for one in TASK.load("val", 40, seed=1)]
    assert set(second) != first
    assert {split_by_hash(question) for question in second} == {"val"}


def test_a_small_space_says_how_many_questions_it_has():
    variant = "coin_flip,min_trials=3,max_trials=3"
    sizes = {}
    for split in task.SIZES:
        with pytest.raises(ValueError, match=f"'coin_flip' has only .* in its {split} split, not 64") as refused:
            task.load(split, 64, variant=variant)
        sizes[split] = int(re.search(r"only (\d+) distinct", str(refused.value)).group(1))
        assert len(task.load(split, sizes[split], variant=variant)) == sizes[split]
    assert sum(sizes.values()) == 8, "three tosses have eight outcomes"


@pytest.mark.parametrize("name", ["isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"])
def test_data_sets_that_draw_from_sets_draw_the_same_in_every_process(name):
    other = task.Sandbox(FOLDER / "drawer.py")
    try:
        drawn = [one.call("draw", cpu_s=60, name=name, settings={}, seed=5, size=2) for one in (task._sandbox, other)]
    finally:
        other.close()
    assert drawn[0] == drawn[1]


# --- Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "name", "settings"),
    [
        (None, "chain_sum", {}),
        ("maze", "maze", {}),
        ("chain_sum,min_terms=2,max_terms=3", "chain_sum", {"min_terms": 2, "max_terms": 3}),
        ('basic_arithmetic,operators=["+","-"],whitespace=no_space', "basic_arithmetic",
         {"operators": ["+", "-"], "whitespace": "no_space"}),
        ("chain_sum,allow_negation=true", "chain_sum", {"allow_negation": True}),
    ],
)  # fmt: skip
def test_a_variant_is_a_name_and_settings(variant, name, settings):
    assert task.parse_variant(variant) == task.Variant(name, settings)


def test_settings_reach_the_data_set():
    for one in task.load("train", 10, variant="chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"):
        assert re.search(r": \d [+-] \d =$", one.question)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("chain_summ", "no data set 'chain_summ'; did you mean chain_sum"),
        ("qqqq", "no data set 'qqqq'"),
        ("chain_sum,min_term=3", "no setting 'min_term'; did you mean min_terms"),
        ("chain_sum,seed=3", "no setting 'seed'"),
        ("chain_sum,min_terms=9", r"does not take the settings \{'min_terms': 9\}: max_terms must be >= min_terms"),
        ("chain_sum,min_terms=many", "does not take the settings"),
        ("chain_sum,min_terms", "is not SETTING=VALUE"),
    ],
)
def test_wrong_variants_are_refused(variant, words):
    for use in (task.build_program, lambda variant: task.load("train", 1, variant=variant)):
        with pytest.raises(ValueError, match=words):
            use(variant)


def test_wrong_splits_and_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between"):
        task.load("train", 10**6)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        task.build_program()


def test_the_config_is_valid_and_no_model_is_named():
    assert TASK.config().train.gradient_checkpointing
    assert TASK.model() is None


# --- Fences ----------------------------------------------------------------------------------------------------------


def test_every_scorer_that_runs_the_answer_as_code_is_known():
    runs = re.compile(r"(?<!literal_)(eval|exec|sympify|parse_expr)\(answer\b")
    sources = {name: Path(sys.modules[kind.__module__].__file__).read_text() for name, (kind, _) in DATASETS.items()}
    found = {name for name, source in sources.items() if runs.search(source)}
    assert found == {*drawer.RUN_AS_CODE, *drawer.SYMBOLIC}


@pytest.mark.parametrize("name", [*drawer.RUN_AS_CODE, *drawer.SYMBOLIC])
def test_an_answer_is_never_run(name, tmp_path):
    mark = tmp_path / "mark"
    (one,) = task.load("val", 1, variant=name)
    for code in (f"open({str(mark)!r}, 'w')", f"__import__('os').system('touch {mark}')"):
        assert task.metric(one, predict("", code)).score < 0.1
    assert not mark.exists()
    assert task.metric(one, task.reference(one)).score == 1.0


def test_a_list_still_earns_what_its_scorer_gives_it():
    (one,) = task.load("val", 1, variant="spiral_matrix")
    assert task.metric(one, predict("", str(one.answer.split()))).score == 0.1


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("3*x**2 + sin(x)/2 + C", True),
        ("(25 - 7)*3^2", True),
        ("0.5*exp(-x) + log(2*x)", True),
        ("", True),
        ("open(1)", False),
        ("Integral(x, x)", False),
        ("x.subs", False),
        ("().__class__", False),
        ("'a'*9", False),
        ("[1]", False),
    ],
)
def test_symbolic_answers_are_algebra_only(text, allowed):
    assert drawer.is_expression(text) is allowed


def test_unsolved_integrals_are_no_answers():
    entries = drawer.draw("intermediate_integration", {}, 1000, 40)
    assert 20 < len(entries) < 40
    assert not any("Integral" in entry["answer"] for entry in entries)


def test_an_answer_that_computes_for_ever_scores_zero_and_the_next_is_scored(monkeypatch):
    monkeypatch.setattr(task, "SCORE_CPU_S", 1.0)
    (one,) = task.load("val", 1, variant="countdown")
    assert task.metric(one, predict("", "9**9**9**9**9")).score == 0.0
    assert task.metric(one, task.reference(one)).score == 1.0


# --- Scores and feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("working", "answer", "worth"),
    [
        ("so it is 12", "12", 1.0),
        ("so it is 12.", "12", 1.0),
        ("so it is\n 1 2\n 3", "1 2\n3", 1.0),
        ("12 it is" + ", and so on" * 20, "12", 0.5),
        ("so it is -12", "12", 0.0),
        ("so it is 12.5", "12", 0.0),
        ("so it is 312", "12", 0.0),
        ("so it is -12", "-12", 1.0),
        ("nothing", "12", 0.0),
        (None, "12", 0.0),
    ],
)
def test_the_working_must_end_with_the_answer(working, answer, worth):
    assert task.place(working, answer) == worth


def test_the_score_is_the_answers_and_each_predictor_has_its_own():
    found = task.metric(example(), predict("It is -52", "52"))
    assert found.score == 0.0
    assert found.feedback == (
        'solve: Right.\nanswer: Got "52", expected "-52". '
        "Keep to the case, the spaces and the punctuation of the form that the question asks for."
    )
    solve = task.metric(example(), predict("It is 7", "-52"), None, "solve", None)
    assert solve.score == 0.0
    assert solve.feedback == (
        'The working should reach "-52". '
        "Write out every step in order, check each against the question, and end with the result alone."
    )
    assert task.metric(example(), predict("It is 7", "-52"), None, "answer", None).score == 1.0


def test_text_around_the_answer_earns_what_the_scorer_gives_it():
    found = task.metric(example(), predict("", "It is -52."))
    assert found.score == 3 / 10
    assert "Leave out every word" in found.feedback


def test_where_many_answers_are_right_the_working_may_reach_another_than_the_reference():
    entry = {"question": "", "answer": "2*3*4", "metadata": {"numbers": [2, 3, 4], "target": 24}}
    one = dspy.Example(question="", answer="2*3*4", entry=repr(entry), variant="countdown").with_inputs("question")
    assert task.metric(one, predict("so 4*3*2", "4*3*2"), pred_name="solve").score == 1.0
    assert task.metric(one, predict("so 4*3+2", "4*3+2"), pred_name="solve").score == 0.05


@pytest.mark.parametrize(
    ("working", "answer", "lesson"),
    [
        ("", "", "Always state a final answer"),
        ("It is -52", "7", "Copy the result of the working"),
        ("It is 7", "7", "The result itself is wrong"),
    ],
)
def test_feedback_names_the_reason_in_words_that_a_reflector_can_take_over(working, answer, lesson):
    feedback = task.metric(example(), predict(working, answer), pred_name="answer").feedback
    entry = {"Inputs": {"question": example().question, "working": working}, "Generated Outputs": {"answer": answer}}
    entry["Instance"] = tuple(str(value) for value in example().labels().values())
    (general,) = [sentence for sentence in sentences(feedback) if is_general(sentence, entry)]
    assert general.startswith(lesson)


def test_answers_are_quoted_on_one_line_and_cut():
    feedback = task.metric(example(), predict("", 'a\n"b' + "c" * 1000), pred_name="answer").feedback
    assert feedback.startswith('Got "a\\n\\"bccc')
    assert "\n" not in feedback
    assert len(feedback) < 600


@pytest.mark.parametrize("prediction", [dspy.Prediction(), predict(None, None), predict(["-52"], {"a": 1}), predict()])
def test_malformed_predictions_score_zero(prediction):
    for name in (None, "solve", "answer"):
        assert task.metric(example(), prediction, pred_name=name).score == 0.0


def test_an_unknown_predictor_is_refused():
    with pytest.raises(ValueError, match="no predictor 'third'"):
        task.metric(example(), dspy.Prediction(), pred_name="third")


# --- End to end ------------------------------------------------------------------------------------------------------


def test_the_program_runs_with_right_and_with_wrong_answers(scripted):
    examples = TASK.load("val", 4)

    def right(prompt, request):
        one = next(one for one in examples if one.question in prompt)
        working = f"Adding up gives {one.answer}"
        return chat_answer(working=working, answer=one.answer if working in prompt else "not told")

    def wrong(prompt, request):
        return chat_answer(working="It is 123456789", answer="123456789")

    for rollout in collect(scripted(right), TASK.build_program(), TASK.metric, examples):
        assert (rollout.score, rollout.predictor_scores) == (1.0, {"solve": 1.0, "answer": 1.0})
        assert [call.predictor for call in rollout.calls] == ["solve", "answer"]
    for rollout in collect(scripted(wrong), TASK.build_program(), TASK.metric, examples):
        assert (rollout.score, rollout.predictor_scores) == (0.0, {"solve": 0.0, "answer": 0.0})
        assert "The result itself is wrong" in rollout.feedback["answer"]
