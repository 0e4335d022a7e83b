"""The letters tasks: rules and grades worked by hand, splits, pretraining's data, and the model that is shipped."""

import random
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.utils import DummyLM
from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer.task_kit import KINDS
from programs import pretraining
from programs.letters import drawing, pretrain, rules, task

MODEL = Path(task.model())


# --- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "letters", "expected"),
    [
        (("copy",), "a c b", "a c b"),
        (("reverse",), "a c b", "b c a"),
        (("sort",), "c a b a", "a a b c"),
        (("rotate",), "a c b", "c b a"),
        (("double",), "a c", "a a c c"),
        (("drop_first",), "a c b", "c b"),
        (("drop_last",), "a c b", "a c"),
        (("keep_odd",), "a c b d e", "a b e"),
        (("dedupe",), "a c a b c", "a c b"),
        (("swap_ends",), "a c d b", "b c d a"),
        (("rotate_right",), "a c b", "b a c"),
        (("sort_down",), "c a b a", "c b a a"),
        (("keep_even",), "a c b d e", "c d"),
        (("swap_start",), "a c b", "c a b"),
        (("double_first",), "a c b", "a a c b"),
        (("double_last",), "a c b", "a c b b"),
        (("sort", "rotate"), "c a b", "b c a"),
        (("rotate", "sort"), "c a b", "a b c"),
        (("reverse", "drop_first"), "a c b", "c a"),
        (("keep_odd", "double"), "a c b", "a a b b"),
    ],
)
def test_rules_answer_as_worked_by_hand(rule: rules.Rule, letters: str, expected: str) -> None:
    assert rules.apply(rule, letters.split()) == expected.split()


@pytest.mark.parametrize("name", rules.OPERATIONS)
def test_operations_take_short_lists_and_leave_their_input_alone(name: str) -> None:
    one, none = ["a"], []  # type: list[str], list[str]
    rules.apply((name,), one)
    assert rules.apply((name,), none) == []
    assert one == ["a"]


def test_sentences_name_the_rule_in_order() -> None:
    assert rules.sentence(("drop_last",)) == "Drop the last letter."
    assert rules.sentence(("sort", "rotate")) == "Sort the letters, then move the first letter to the end."
    assert rules.sentence(("sort", "rotate"), (1, 1), chain=1) == (
        "First put the letters in alphabetical order, then rotate the letters left by one."
    )


def test_three_operations_are_named_in_three_sentences() -> None:
    assert rules.sentence(("drop_first", "sort", "rotate")) == (
        "Drop the first letter. Sort the letters. Move the first letter to the end."
    )


def test_what_is_kept_for_the_tasks_is_told_from_what_may_be_trained_on() -> None:
    triples = list(product(rules.OPERATIONS, repeat=3))
    kept = {rule for rule in triples if rules.withheld(rule)}
    assert all(rules.withheld(rule) for rule in rules.WITHHELD)
    assert rules.withheld(("drop_last", "reverse"))  # acts like reverse, drop_first
    assert rules.withheld(("copy", "sort", "rotate")) and rules.withheld(("sort", "copy", "rotate"))
    assert not any(rules.withheld((name,)) for name in rules.OPERATIONS)
    assert not any(map(rules.withheld, rules.trained_pairs()))
    assert not {rules.action(rule) for rule in kept} & {rules.action(rule) for rule in triples if rule not in kept}
    of_three = [rule for rule in triples if rules.action(rule) not in rules.shortest(2)]
    assert 0.2 < sum(map(rules.withheld, of_three)) / len(of_three) < 0.3


def test_rules_that_act_alike_are_found() -> None:
    assert rules.alike(("reverse", "drop_first"), ("drop_last", "reverse"))
    assert not rules.alike(("sort", "rotate"), ("rotate", "sort"))


# --- Grades and feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("b a c d", "b a c d", 1.0),
        ("b c a", "b a c d", 1 / 9),  # in common: b first; of 4 and 5
        ("b a", "b a c d", 2 / 8),  # b first, b a; of 3 and 5
        ("b a c d e f g h", "b a c d", 4 / 14),  # b first, b a, a c, c d; of 9 and 5
        ("a a a", "a a", 3 / 7),  # a first, a last, a a once; of 4 and 3
        ("c d b a", "b a c d", 2 / 10),  # c d, b a
        ("['b', 'a', 'c', 'd']", "b a c d", 0.0),
        ("", "b a", 0.0),
        (None, "b a", 0.0),
        (None, "", 0.0),
        (["b", "a"], "b a", 0.0),
        ("", "", 1.0),
    ],
)
def test_grade_is_half_neighbours_and_half_the_whole_list(answer: object, target: str, score: float) -> None:
    assert task.grade(answer, target) == pytest.approx(score)


LISTS = st.lists(st.sampled_from(rules.ALPHABET), min_size=1, max_size=9).map(" ".join)


@given(LISTS, LISTS)
def test_only_the_right_list_earns_more_than_half(answer: str, target: str) -> None:
    assert (task.grade(answer, target) == 1.0) == (answer == target)
    assert answer == target or 0 <= task.grade(answer, target) <= 0.5


def mean_grade(rule: rules.Rule, answer: Any) -> float:
    """Of what `answer` makes of 200 lists of 5 to 8 letters, where the rule is right."""
    rng = random.Random(0)
    drawn = [rng.choices(rules.ALPHABET, k=rng.randint(5, 8)) for _ in range(200)]
    return sum(task.grade(answer(letters), " ".join(rules.apply(rule, letters))) for letters in drawn) / len(drawn)


HIDDEN = sorted({stage.rule for name in rules.DEV for stage in task.variant_named(name).stages if len(stage.rule) > 1})


@pytest.mark.parametrize("rule", HIDDEN)
def test_answers_that_follow_no_rule_earn_little(rule: rules.Rule) -> None:
    rng = random.Random(1)
    assert mean_grade(rule, lambda letters: "") == 0
    assert mean_grade(rule, lambda letters: "a") < 0.1
    assert mean_grade(rule, lambda letters: " ".join(rules.ALPHABET)) < 0.15
    assert mean_grade(rule, lambda letters: " ".join(rng.sample(letters, len(letters)))) < 0.2
    assert mean_grade(rule, lambda letters: " ".join(letters * 3)) < 0.25
    assert mean_grade(rule, lambda letters: " ".join(sorted(letters))) < 0.5
    assert mean_grade(rule, " ".join) < 0.4


def test_a_step_of_the_rule_earns_more_than_none_and_fewer_than_all() -> None:
    # By positions alone, sorted letters earned less than a copy where they should be sorted and rotated.
    rule = ("sort", "rotate")
    copied, sorted_, right = (
        mean_grade(rule, lambda x, r=r: " ".join(rules.apply(r, x))) for r in ((), rule[:1], rule)
    )
    assert copied + 0.1 < sorted_ < 0.5 < right == 1.0


def example(letters: str = "c a b d", variant: str = "pipeline") -> dspy.Example:
    """A pipeline example: `a b d` after the first stage, `b d a` after the second."""
    return dspy.Example(letters=letters, variant=variant).with_inputs("letters")


def test_a_pipeline_scores_the_mean_of_its_predictors() -> None:
    result = task.metric(example(), dspy.Prediction(middle="a b d", answer="b a d"))
    assert result.score == (1 + 1 / 8) / 2  # in common: b first; of 4 and 4
    assert result.feedback == (
        'first: Right: "c a b d" gives "a b d".\n'
        'second: Got "b a d", but "a b d" gives "b d a". Sort the letters, then move the first letter to the end.'
    )


def test_a_named_predictor_gets_its_own_score_and_feedback() -> None:
    first = task.metric(example(), dspy.Prediction(middle="a b", answer="b a"), None, "first", None)
    assert first.score == 2 / 7  # a first, a b; of 3 and 4
    assert first.feedback == 'Got "a b", but "c a b d" gives "a b d". Drop the first letter.'


def test_a_predictor_is_judged_by_what_it_was_given_and_the_program_by_what_it_should_have_made() -> None:
    early = dspy.Prediction(middle="a b", answer="b a")
    second = task.metric(example(), early, None, "second")
    assert (second.score, second.feedback) == (1.0, 'Right: "a b" gives "b a".')
    assert task.metric(example(), early).score == pytest.approx(2 / 7)  # both: `b a` for `b d a` has b first, a last
    right_by_chance = dspy.Prediction(middle="a b", answer="b d a")
    assert task.metric(example(), right_by_chance, None, "second").score == pytest.approx(2 / 7)
    assert '"a b" gives "b a"' in task.metric(example(), right_by_chance, None, "second").feedback


@pytest.mark.parametrize("middle", [None, "", "a", 7])
def test_a_predictor_that_was_given_no_list_is_judged_by_the_chain(middle: object) -> None:
    judged = task.metric(example(), dspy.Prediction(middle=middle, answer="b d a"), None, "second")
    assert judged.score == 1.0
    assert task.metric(example(), dspy.Prediction(middle=middle, answer=middle), None, "second").score < 0.2


def test_missing_fields_and_predictions_score_zero() -> None:
    assert task.metric(example(), dspy.Prediction()).score == 0
    assert task.metric(example(), dspy.Prediction(middle=None, answer=7)).score == 0
    assert "Got no answer" in task.metric(example(), dspy.Prediction()).feedback


def test_an_unknown_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match="no predictor 'third'"):
        task.metric(example(), dspy.Prediction(), pred_name="third")


def test_the_rule_sentence_in_feedback_names_no_instance() -> None:
    for variant in task.VARIANTS.values():
        for stage in variant.stages:
            words = rules.sentence(stage.rule).lower().replace(".", " ").replace(",", " ").split()
            assert not set(words) & set(rules.ALPHABET)


# --- Kinds of feedback -----------------------------------------------------------------------------------------------

ANSWERS = st.one_of(
    st.none(), st.integers(), st.lists(st.sampled_from([*rules.ALPHABET, "zz"]), max_size=9).map(" ".join)
)
RULES = ("pipeline", "held-out", "sort", "drop_first.sort-rotate", "dedupe-sort-rotate", "reverse.sort.keep_odd")


def judged(prediction: dspy.Prediction, rule: str, letters: str, kind: str, pred_name: str | None = None) -> Any:
    return task.metric(example(letters, f"{rule}+{kind}"), prediction, None, pred_name)


@given(st.sampled_from(RULES), st.lists(st.sampled_from(rules.ALPHABET), min_size=5, max_size=9), ANSWERS, ANSWERS)
def test_the_score_is_the_same_in_all_kinds(rule: str, letters: list[str], middle: object, answer: object) -> None:
    prediction, text = dspy.Prediction(middle=middle, inner=middle, answer=answer), " ".join(letters)
    for name in (None, *(stage.name for stage in task.variant_named(rule).stages)):
        told = task.metric(example(text, rule), prediction, None, name).score
        assert [judged(prediction, rule, text, kind, name).score for kind in KINDS] == [told] * len(KINDS)


def test_each_kind_gives_away_what_it_says() -> None:
    prediction = dspy.Prediction(middle="a b d", answer="b a d")
    assert judged(prediction, "pipeline", "c a b d", "shown").feedback == (
        'first: Right: "c a b d" gives "a b d".\nsecond: Got "b a d", but "a b d" gives "b d a".'
    )
    second = judged(prediction, "pipeline", "c a b d", "shown", "second").feedback
    assert second == 'Got "b a d", but "a b d" gives "b d a".'
    assert judged(prediction, "pipeline", "c a b d", "scored", "first").feedback == "Score 1.00."


@given(st.sampled_from(RULES), st.lists(st.sampled_from(rules.ALPHABET), min_size=5, max_size=9))
def test_shuffled_feedback_shows_another_lists_answer_and_never_the_right_one(rule: str, letters: list[str]) -> None:
    text, variant = " ".join(letters), task.variant_named(rule)
    right = task.targets(variant, text)
    prediction = dspy.Prediction(**right)
    for stage in variant.stages:
        told = [judged(prediction, rule, text, "shuffled", stage.name).feedback for _ in range(2)]
        assert told[0] == told[1]
        assert told[0].startswith(
            f'Got "{right[stage.target]}", but "{({"letters": text} | right)[stage.source]}" gives "'
        )
        assert not told[0].endswith(f'gives "{right[stage.target]}".')


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_program_and_lists(kind: str) -> None:
    for rule in ("pipeline", "drop_first.sort-rotate"):
        plain, kinded = task.load("val", 20, variant=rule), task.load("val", 20, variant=f"{rule}+{kind}")
        assert [one.letters for one in kinded] == [one.letters for one in plain]
        assert {one.variant for one in kinded} == {rule if kind == "told" else f"{rule}+{kind}"}
        assert task.build_program(f"{rule}+{kind}").fields == task.build_program(rule).fields


def test_the_default_task_has_kinds_too() -> None:
    assert task.load("val", 1, variant="+shown")[0].variant == "pipeline+shown"
    with pytest.raises(
        ValueError, match="unknown kind of feedback 'said'; choose one of told, shown, scored, shuffled"
    ):
        task.build_program("pipeline+said")


# --- Variants and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_every_variant_runs_and_perfect_answers_score_one(variant: str) -> None:
    program = task.build_program(variant)
    names = [name for name, _ in program.named_predictors()]
    assert names == ["first", "second", "third"][: len(names)]
    assert {predictor.signature.instructions for predictor in program.predictors()} == {task.SEED_INSTRUCTION}
    one = task.load("val", 1, variant=variant)[0]
    right = task.targets(task.VARIANTS[variant], one.letters)
    with dspy.context(lm=DummyLM([{field: text} for field, text in right.items()])):
        prediction = program(**one.inputs())
    assert prediction.answer == one.answer
    assert task.metric(one, prediction).score == 1


SHORT = st.lists(st.lists(st.sampled_from(tuple(rules.OPERATIONS)), min_size=1, max_size=3), min_size=1, max_size=3)


@given(SHORT)
def test_a_spelled_rule_has_lists_of_lengths_that_the_model_knows_or_is_refused(stages: list[list[str]]) -> None:
    rule = ".".join("-".join(stage) for stage in stages)
    try:
        examples = task.load("train", 20, variant=rule)
    except ValueError as error:
        assert "too short or too long" in str(error)
        return
    assert [stage.rule for stage in task.variant_named(rule).stages] == list(map(tuple, stages))
    for one in examples:
        lists = [one.letters, *task.targets(task.variant_named(rule), one.letters).values()]
        assert all(2 <= len(text.split()) <= 9 for text in lists[:-1])
        assert 1 <= len(lists[-1].split()) <= 18


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [("sort.reverse", (5, 8)), ("drop_first-drop_first-drop_first.drop_first.sort", (6, 9)), ("double.sort", (2, 4))],
)
def test_lengths_suit_the_spelled_rule(rule: str, lengths: tuple[int, int]) -> None:
    assert task.variant_named(rule).lengths == lengths


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("srot", "unknown variant 'srot' of letters; choose one of pipeline, .* out of copy, reverse"),
        ("sort.sort.sort.sort", "'sort.sort.sort.sort' of letters is too long"),
        ("double.double.double", "'double.double.double' of letters makes lists too short or too long"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task.load("train", 1, variant=rule)


def test_the_right_instructions_and_answers_are_given_by_predictor() -> None:
    assert task.instructions("pipeline+shown") == {
        "first": "Drop the first letter.",
        "second": "Sort the letters, then move the first letter to the end.",
    }
    right = {"first": {"middle": "a b d"}, "second": {"answer": "b d a"}}
    assert task.answers(example(), "pipeline") == task.answers(example()) == right


def test_the_probes_are_the_single_operations() -> None:
    assert [task.variant_named(probe).stages[0].rule for probe in task.probes()] == [(op,) for op in rules.OPERATIONS]
    assert {len(task.variant_named(probe).stages) for probe in task.probes("held-out")} == {1}


def test_the_default_variant_is_a_pipeline_of_two() -> None:
    assert len(task.build_program().predictors()) == 2
    assert task.load("train", 3) == task.load("train", 3, variant="pipeline")


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_splits_are_disjoint_sized_and_repeatable(variant: str) -> None:
    splits = {split: task.load(split, variant=variant) for split in task.SIZES}
    lists = {split: {one.letters for one in examples} for split, examples in splits.items()}
    assert {split: len(letters) for split, letters in lists.items()} == task.SIZES
    assert not lists["train"] & lists["val"]
    assert not lists["train"] & lists["test"]
    assert not lists["val"] & lists["test"]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]


def test_another_seed_stays_in_its_split() -> None:
    first = {one.letters for one in task.load("train", 400, seed=0, variant="sort-rotate")}
    second = [one.letters for one in task.load("train", 400, seed=1, variant="sort-rotate")]
    assert set(second) != first
    assert {task.split_of(letters.split()) for letters in second} == {"train"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant 'nope'"):
        task.build_program("nope")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between"):
        task.load("train", 10**6)


def test_the_held_out_rules_are_used_by_no_other_variant() -> None:
    def combinations(names: list[str]) -> set[rules.Rule]:
        return {stage.rule for name in names for stage in task.VARIANTS[name].stages if len(stage.rule) > 1}

    assert not combinations(["held-out"]) & combinations([name for name in task.VARIANTS if name != "held-out"])


# --- Rules for development and for the proof -------------------------------------------------------------------------


def rules_of(names: tuple[str, ...]) -> list[rules.Rule]:
    return [stage.rule for name in names for stage in task.variant_named(name).stages]


def test_the_tasks_are_those_that_the_committed_seed_draws() -> None:
    assert drawing.draw("dev") == rules.DEV[:5]
    assert drawing.draw("proof") == rules.PROOF
    assert drawing.draw("proof", seed=15) != rules.PROOF


def test_five_programs_have_one_predictor_with_a_pair_or_a_triple_that_nothing_was_trained_on() -> None:
    for names in (rules.DEV[:5], rules.PROOF):
        drawn = rules_of(names)
        assert [len(rule) for rule in drawn] == [2, 2, 2, 3, 3]
        assert len(set(drawn)) == 5
        assert all(map(rules.withheld, drawn))
        assert all(task.variant_named(name).lengths == (5, 8) for name in names)


def test_no_rule_of_the_proof_is_one_of_development_or_was_published() -> None:
    proof, dev = rules_of(rules.PROOF), [rule for rule in rules_of(rules.DEV) if len(rule) > 1]
    assert not any(rules.alike(one, other) for one in proof for other in (*dev, *rules.PUBLISHED))
    assert not any(rules.alike(one, other) for one in proof for other in rules.trained_pairs())
    assert {pair for pair in proof if len(pair) == 2} <= set(rules.WITHHELD) - set(rules.PUBLISHED)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (("sort", "rotate"), True),
        (("drop_first", "rotate_right", "double_last"), True),
        (("rotate", "rotate_right", "sort"), False),  # undone: only the sorting is left
        (("sort", "reverse", "sort"), False),  # sorting again
        (("sort", "copy"), False),
        (("keep_odd", "drop_first", "drop_last"), False),  # nothing may be left
    ],
)
def test_a_rule_is_needed_where_nothing_simpler_does_it(rule: rules.Rule, found: bool) -> None:
    assert drawing.needed(rule) == found


def test_rules_that_agree_on_more_than_a_third_of_the_lists_are_near() -> None:
    assert drawing.near(("sort",), ("reverse", "sort"))
    assert drawing.near(("drop_first", "drop_last", "dedupe"), ("drop_first", "drop_last"))
    assert not drawing.near(("sort",), ("sort", "rotate"))


# --- Pretraining's data ----------------------------------------------------------------------------------------------


def test_every_combination_in_a_variant_is_kept_out_of_pretraining() -> None:
    proven = {name: variant for name, variant in task.VARIANTS.items() if name != "demo"}
    hidden = {stage.rule for variant in proven.values() for stage in variant.stages if len(stage.rule) > 1}
    assert hidden <= set(rules.WITHHELD)
    assert not any(rules.alike(pair, kept) for pair in pretrain.PAIRS for kept in rules.WITHHELD)


def test_pretraining_knows_the_fields_of_every_variant() -> None:
    fields = {(stage.source, stage.target) for variant in task.VARIANTS.values() for stage in variant.stages}
    assert fields == set(pretrain.FIELDS)


def test_the_sampler_never_draws_a_withheld_rule() -> None:
    rng = random.Random(0)
    drawn = {pretrain.draw_rule(rng, pair_share=0.5) for _ in range(5000)}
    assert drawn == set(pretrain.SINGLES) | set(pretrain.PAIRS)
    assert not any(rules.alike(rule, kept) for rule in drawn for kept in rules.WITHHELD)


def test_no_withheld_sentence_is_in_any_pretraining_prompt() -> None:
    rng = random.Random(1)
    sentences = [rules.sentence(rule) for rule in rules.WITHHELD]
    prompts = [pretrain.draw_example(rng)[0][0]["content"] for _ in range(5000)]
    assert not any(sentence in prompt for sentence in sentences for prompt in prompts)


@pytest.mark.parametrize("instruction", ["Answer the question.", "Answer the question.\n\nSort the letters."])
@pytest.mark.parametrize("demo", [None, ("a b", "b a")])
def test_substituted_prompts_are_what_the_chat_adapter_makes(instruction: str, demo: tuple[str, str] | None) -> None:
    signature = dspy.Signature("letters -> middle", instruction)
    demos = [{"letters": demo[0], "middle": demo[1]}] if demo else []
    made = pretrain.messages_for("letters", "middle", instruction, "a c b", demo)
    assert made == dspy.ChatAdapter().format(signature, demos, {"letters": "a c b"})


def test_completions_parse_to_their_answer() -> None:
    completion = pretrain.completion_for("answer", "a c b").removesuffix(pretraining.END)
    assert pretrain.parse("letters", "answer", completion) == "a c b"
    assert pretrain.parse("letters", "answer", "a c b") is None


def test_the_generic_instruction_leaves_the_rule_open() -> None:
    rng = random.Random(2)
    grown = set()
    for prompt, completion in (pretrain.draw_example(rng) for _ in range(2000)):
        if prompt[0]["content"].endswith("objective is: \n        Answer the question."):
            letters, answer = prompt[-1]["content"].split("\n")[1], completion.split("\n")[1]
            grown.add((len(answer) > len(letters)) - (len(answer) < len(letters)))
    assert grown == {-1, 0, 1}


# --- The shipped model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer, on one thread: more only get in each other's way on batches this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pretraining.load_model(MODEL)
    torch.set_num_threads(threads)


def test_the_model_folder_is_small_and_safe() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}


def test_the_model_has_about_a_million_parameters_and_plain_generation_settings(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.top_k in (None, 50)
    assert model.generation_config.do_sample in (None, False)


@pytest.mark.parametrize(
    "text",
    [
        "a c f b",
        "Answer the question. Sort the letters.",
        "[[ ## answer ## ]]\na b\n\n[[ ## completed ## ]]",
        "ü ≠ 7\t\n x",
    ],
)
def test_the_tokenizer_gives_text_back_exactly(shipped: tuple[Any, Any], text: str) -> None:
    _, tokenizer = shipped
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_letters_are_single_tokens_and_prompts_are_short(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    assert len(tokenizer("a c f b", add_special_tokens=False).input_ids) == 4
    prompt = pretrain.messages_for("letters", "answer", task.SEED_INSTRUCTION, "a c f b h")
    assert len(pretraining.encode(tokenizer, [prompt])[0]) < 64


def test_the_chat_template_opens_the_assistants_turn(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    prompt = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>x<|end|><|user|>y<|end|><|assistant|>"


def test_naming_the_rules_helps_and_leaves_room_for_training(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    pipeline = task.VARIANTS["pipeline"]
    inputs = [one.letters for one in task.load("test", 96)]
    means, unparsed = {}, {}
    for named in (False, True):
        rows = pretrain.run_variant(model, tokenizer, pipeline, inputs, named)
        scores, _, unparsed[named] = pretrain.score_variant(pipeline, rows)
        means[named] = sum(scores) / len(scores)
    assert 0.05 < means[False] < 0.30
    assert means[False] + 0.30 < means[True] < 0.80
    assert unparsed[True] < 0.02


def test_sampled_answers_under_the_seed_instruction_vary(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    pipeline = task.VARIANTS["pipeline"]
    letters = task.load("train", 1)[0].letters
    rows = pretrain.run_variant(model, tokenizer, pipeline, [letters] * 16, named=False, temperature=1.0)
    scores, _, _ = pretrain.score_variant(pipeline, rows)
    assert len(set(scores)) > 1


def test_random_sentences_are_of_the_grammar_and_may_name_any_rule() -> None:
    known = {rules.sentence(rule) for size in (1, 2, 3) for rule in permutations(rules.OPERATIONS, size)}
    rng = random.Random(0)
    drawn = [rules.random_sentence(rng) for _ in range(2000)]
    assert known.issuperset(drawn)
    assert any(rules.sentence(rule) in drawn for rule in rules.WITHHELD)  # scores alone must be able to lead there


def test_the_kind_of_feedback_says_who_writes_instructions() -> None:
    assert task.reflection_lm() is task.reflection_lm("sort-rotate") is task.reflection_lm("pipeline+told") is None
    assert task.reflection_lm("sort-rotate+scored").model == "hosted_vllm/letters-random-sentences"
    for kind in ("shown", "shuffled"):
        assert task.reflection_lm(f"sort-rotate+{kind}").model == "hosted_vllm/letters-reflector"


def test_the_demo_has_rules_that_were_trained() -> None:
    first, second = (stage.rule for stage in task.VARIANTS["demo"].stages)
    assert len(first) == 1 and second in pretrain.PAIRS and not rules.withheld(second)
