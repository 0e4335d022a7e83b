"""The parcels tasks: rules and scores worked by hand, splits, kinds of feedback, and pretraining's data."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.utils import DummyLM
from transformers import Qwen3ForCausalLM

from fst_optimizer.evolve.extractive import ExtractiveReflector, lessons
from fst_optimizer.tasks import load_task
from programs import pretraining
from programs.parcels import pretrain, reflect, rules, task, training
from programs.parcels.rules import PACK, SORT, STAGES, Clause, Rule

GLASS = ("small", "red", "glass", "Anna", "Oslo", "seven")
TEXT = "small red parcel of glass from Anna to Oslo, seven kilos"
CHAIN = "red_glass_road-over6_sea-air.road_small_wood-card"
"""Red glass by road, else over six kilos by sea, else by air; small ones by road in wood, else in card."""


# --- Rules -----------------------------------------------------------------------------------------------------------


def test_a_parcel_is_read_as_it_was_written() -> None:
    assert rules.text_of(GLASS) == TEXT
    assert all(
        rules.parcel_in(rules.text_of(parcel)) == parcel for parcel in itertools.product(*rules.ATTRIBUTES.values())
    )


@pytest.mark.parametrize(
    ("parcel", "expected"),
    [
        (("small", "red", "glass", "Anna", "Oslo", "seven"), ("road", "wood")),
        (("large", "red", "glass", "Anna", "Oslo", "seven"), ("road", "card")),
        (("small", "red", "books", "Anna", "Oslo", "seven"), ("sea", "card")),
        (("small", "blue", "glass", "Anna", "Oslo", "six"), ("air", "card")),
        (("small", "red", "glass", "Anna", "Oslo", "one"), ("road", "wood")),
    ],
)
def test_the_first_clause_that_holds_decides_and_the_second_stage_knows_the_carrier(
    parcel: rules.Parcel, expected: tuple[str, ...]
) -> None:
    assert rules.applied(rules.read(CHAIN), parcel) == expected


@pytest.mark.parametrize(
    ("word", "kilos"), [("over3", "456789"), ("over6", "789"), ("under4", "123"), ("under7", "123456")]
)
def test_limits_of_weight(word: str, kilos: str) -> None:
    true = [
        number for number, name in enumerate(rules.NUMBERS, start=1) if rules.holds(word, ("", "", "", "", "", name))
    ]
    assert "".join(map(str, true)) == kilos


def test_sentences_name_a_rule() -> None:
    first, second = rules.read("huge_green_tools_Hugo_Rome_over3_road-Oslo_sea-air.under7_road_wood-tiny_metal-card")
    assert rules.sentences(first) == (
        "First, use road for huge green parcels of tools from Hugo to Rome over three kilos.",
        "Second, use sea for parcels to Oslo.",
        "Otherwise, use air.",
    )
    assert rules.sentences(second) == (
        "First, use wood for parcels under seven kilos by road.",
        "Second, use metal for tiny parcels.",
        "Otherwise, use card.",
    )


def test_no_sentence_holds_a_word_of_an_answer() -> None:
    said = " ".join(
        " ".join(rules.sentences(rule))
        for name in (*task.VARIANTS, *task.DEV, *task.PROOF)
        for stage, rule in zip(STAGES, task.rules_named(name), strict=False)
    )
    assert not {answer for stage in STAGES for answer in stage.answers.values()}.intersection(said.split())


def test_rules_are_read_as_they_are_spelled() -> None:
    rng = random.Random(0)
    for shape in [(1,), (2,), (1, 1), (3, 3)]:
        drawn = rules.draw_program(rng, shape, 0.5, lambda rule: True)
        assert rules.read(rules.spelled(drawn)) == drawn
    assert rules.read("glass_red_road-sea") == (Rule((Clause(("red", "glass"), "road"),), "sea"),)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nope", "'nope' of sort has 0 clauses; give 1 to 3 and then the rest"),
        ("red_road-blue_sea-huge_air-tiny_rail-road", "has 4 clauses; give 1 to 3"),
        ("red_road-ship", "unknown answer 'ship' of sort; choose one of road, sea, rail, air"),
        ("pink_road-sea", "unknown condition 'pink' in 'pink_road' of sort; choose one of tiny,"),
        ("road_sea-air", "unknown condition 'road' in 'road_sea' of sort"),
        ("red_blue_sea-air", "'red_blue_sea' of sort: give conditions on different attributes and then one answer"),
        ("sea-air", "'sea' of sort: give conditions on different attributes and then one answer"),
        ("under7_sea-under4_road-air", "'under4_road' of sort: this clause never decides; no parcel gets there"),
        ("over3_sea-under4_road-air", "'air' of sort: what is left for all others never decides"),
        ("red_road-sea.air_wood-card", "'air_wood' of pack: this clause never decides"),
        ("red_road-sea.red_wood-card.red_road-sea", "3 stages, at most 2: sort, pack"),
        ("depot+loud", "unknown kind of feedback 'loud'"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match="unknown") as caught:
        task.build_program(name)
    assert reason in str(caught.value)


# --- Withheld rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "programs"), [("dev", task.DEV), ("proof", task.PROOF)])
def test_withheld_programs_are_those_of_the_committed_seed(part: str, programs: tuple[str, ...]) -> None:
    assert rules.withheld_programs(part, task.SEED) == programs
    assert len(set(programs)) == 5
    for name in programs:
        for rule in task.rules_named(name):
            assert part in rules.parts(rule) <= {part, "trained"}
        assert rules.best_constant(task.rules_named(name)) <= 0.45
    assert any(len(rule.clauses) == 3 for name in programs for rule in task.rules_named(name))


def test_a_quarter_of_the_pairs_is_withheld() -> None:
    counts = Counter(itertools.starmap(rules.part_of, itertools.combinations(rules.WORDS, 2)))
    assert counts == {"trained": 323, "dev": 60, "proof": 52} or counts["trained"] / sum(counts.values()) < 0.78
    assert rules.part_of("red", "Oslo") == rules.part_of("Oslo", "red")


# --- Data ------------------------------------------------------------------------------------------------------------


def test_no_parcel_is_in_two_splits() -> None:
    parcels = {split: {example.parcel for example in task.load(split)} for split in task.SIZES}
    assert [len(parcels[split]) for split in ("train", "val", "test")] == [512, 256, 512]
    assert not any(one & other for one, other in itertools.combinations(parcels.values(), 2))


@pytest.mark.parametrize("name", [*task.VARIANTS, *task.DEV, *task.PROOF])
def test_no_answer_that_never_changes_does_well(name: str) -> None:
    examples = task.load("test", variant=name)
    hidden = task.rules_named(name)
    most = []
    for stage, rule in zip(STAGES, hidden, strict=False):
        counts = Counter(example[stage.target] for example in examples)
        assert set(counts) == {stage.answers[way] for way in rules.ways(rule)}
        most.append(max(counts.values()) / len(examples))
    single = all(len(rule.clauses) == 1 for rule in hidden)
    assert sum(most) / len(most) <= (0.67 if single else 0.47)


def test_smaller_sizes_and_other_kinds_have_the_same_examples() -> None:
    many, few = task.load("val", 64, variant="harbour+shown"), task.load("val", 8, variant="harbour")
    assert [example.parcel for example in few] == [example.parcel for example in many[:8]]
    assert [example.id for example in few] == [example.id for example in many[:8]]
    assert task.load("val", 8, seed=1, variant="harbour")[0].parcel != few[0].parcel


def test_the_largest_load_ends() -> None:
    assert len(task.load("test", task.LARGEST_SIZE, variant=task.DEV[3])) == task.LARGEST_SIZE


# --- Metric ----------------------------------------------------------------------------------------------------------


def judged(variant: str, name: str | None = None, **answers: Any) -> tuple[float, str]:
    example = dspy.Example(parcel=TEXT, variant=variant).with_inputs("parcel")
    made = task.metric(example, dspy.Prediction(**answers), pred_name=name)
    return made.score, made.feedback


def test_each_predictor_is_graded_for_itself() -> None:
    assert judged(CHAIN, carrier="truck", case="crate") == (1.0, "sort: Right.\npack: Right.")
    assert judged(CHAIN, carrier=" truck\n", case="box")[0] == 0.5
    assert judged(CHAIN, carrier="ship", case="crate")[0] == 0.5
    assert judged(CHAIN, case="Crate")[0] == 0.0
    assert judged(CHAIN, "pack", carrier="ship", case="crate") == (1.0, "Right.")


@pytest.mark.parametrize(
    ("kind", "feedback"),
    [
        (
            "",
            'Got "ship", expected "truck". First, use road for red parcels of glass. '
            "Second, use sea for parcels over six kilos. Otherwise, use air.",
        ),
        ("+shown", 'Got "ship", expected "truck".'),
        ("+scored", "Score 0.00."),
    ],
)
def test_kinds_tell_less_and_less(kind: str, feedback: str) -> None:
    assert judged(CHAIN + kind, "sort", carrier="ship") == (0.0, feedback)


def test_shuffled_feedback_shows_another_examples_answers_and_the_same_score() -> None:
    shown = Counter()  # type: Counter[str]
    for example in task.load("train", 64, variant=f"{CHAIN}+shuffled"):
        made = task.metric(example, dspy.Prediction(carrier="train", case="tin"), pred_name="sort")
        assert made.score == 0.0
        assert made.feedback == task.metric(example, dspy.Prediction(carrier="train"), pred_name="sort").feedback
        shown[made.feedback.split('"')[3] == example.carrier] += 1
    assert shown[False] > 20
    assert shown[True] > 5


def entry(example: dspy.Example, predictor: str, answers: dict[str, str]) -> dict[str, Any]:
    made = task.metric(example, dspy.Prediction(**answers), pred_name=predictor)
    return {
        "Inputs": {"parcel": example.parcel, "carrier": answers["carrier"]},
        "Generated Outputs": answers,
        "Feedback": made.feedback,
        "Metric Feedback": made.feedback,
        "Score": made.score,
        "Instance": tuple(str(value) for value in example.labels().values()),
    }


@pytest.mark.parametrize("predictor", ["sort", "pack"])
def test_told_sentences_are_taken_over_whatever_was_answered(predictor: str) -> None:
    variant = task.DEV[0]
    examples = task.load("train", 4, variant=variant)
    for carrier, case in itertools.product(SORT.answers.values(), PACK.answers.values()):
        dataset = [entry(example, predictor, {"carrier": carrier, "case": case}) for example in examples]
        failing = sum(one["Score"] < 1 for one in dataset)
        _, rule = task.task_named(variant)[0][predictor]
        assert lessons(dataset) == dict.fromkeys(rules.sentences(rule), failing) or failing == 0
    text: str | None = task.SEED_INSTRUCTION
    for _ in rules.sentences(rule):
        text = ExtractiveReflector()(predictor, str(text), dataset)
    assert sorted(str(text).split(". ")) != sorted(task.SEED_INSTRUCTION.split(". "))
    assert ExtractiveReflector()(predictor, str(text), dataset) is None


@pytest.mark.parametrize("kind", ["shown", "shuffled"])
def test_other_kinds_tell_nothing_that_could_be_taken_over(kind: str) -> None:
    examples = task.load("train", 6, variant=f"depot+{kind}")
    assert lessons([entry(example, "sort", {"carrier": "plane", "case": "tin"}) for example in examples]) == {}


# --- What commands ask -----------------------------------------------------------------------------------------------


def test_right_answers_and_instructions_by_predictor() -> None:
    example = dspy.Example(parcel=TEXT, variant=CHAIN).with_inputs("parcel")
    assert task.answers(example, CHAIN) == {"sort": {"carrier": "truck"}, "pack": {"case": "crate"}}
    assert task.instructions(CHAIN)["pack"] == ("First, use wood for small parcels by road. Otherwise, use card.")
    assert set(task.instructions("sorting")) == {"sort"}


@pytest.mark.parametrize("variant", [None, "sorting", task.DEV[1]])
def test_probes_are_other_rules_of_one_clause_for_the_same_program(variant: str | None) -> None:
    own = {word for _, rule in task.task_named(variant)[0].values() for word in rule.words}
    found = task.probes(variant)
    assert len(set(found)) == task.PROBES
    for name in found:
        assert task.build_program(name).named_predictors()[0][0] == "sort"
        assert task.task_named(name)[0].keys() == task.task_named(variant)[0].keys()
        for rule in task.rules_named(name):
            assert len(rule.words) == 1
            assert own.isdisjoint(rule.words)


def test_who_writes_instructions_follows_from_the_kind_of_feedback() -> None:
    assert task.reflection_lm("depot") is None
    for kind in ("shown", "shuffled"):
        assert task.reflection_lm(f"depot+{kind}").model == "hosted_vllm/parcels-reflector"  # type: ignore[union-attr]
    (written,) = task.reflection_lm("depot+scored")("Write an instruction.")  # type: ignore[misc]
    text = written if isinstance(written, str) else written["text"]
    lines = reflect.lines_in(text)
    assert lines[-1][0] == len(rules.RANKS)
    assert reflect.lines_in(text.replace("use", "take")) == []


def test_the_program_runs_and_carries_both_answers() -> None:
    lm = DummyLM([{"carrier": "truck"}, {"case": "crate"}])
    program = task.build_program("depot")
    program.set_lm(lm)
    made = program(parcel=TEXT)
    assert (made.carrier, made.case) == ("truck", "crate")
    assert "truck" in lm.history[-1]["messages"][-1]["content"]
    assert [name for name, _ in task.build_program("sorting").named_predictors()] == ["sort"]


def test_the_task_is_found_by_name() -> None:
    found = load_task(f"programs/parcels:{CHAIN}+shown")
    assert found.load("val", 2)[0].variant == f"{CHAIN}+shown"
    assert found.module.DEV == task.DEV


# --- Pretraining's data ----------------------------------------------------------------------------------------------


def test_prompts_are_those_that_dspy_makes() -> None:
    values = {"parcel": TEXT, "carrier": "truck"}
    for stage in STAGES:
        signature = dspy.Signature(f"{', '.join(stage.sources)} -> {stage.target}", "Do it.\nNow.")
        own = {source: values[source] for source in stage.sources}
        assert pretrain.messages_for(stage, "Do it.\nNow.", values) == dspy.ChatAdapter().format(signature, [], own)


def test_nothing_withheld_is_in_pretraining() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        lines = pretrain.draw_lines(rng, rng.choice(STAGES))
        words = [words for _, words, _ in lines]
        assert all(rules.part_of(*both) == "trained" for both in words if len(both) == 2)


def test_the_answer_is_that_of_the_first_line_by_rank_that_fits() -> None:
    lines: pretrain.Lines = [(3, (), "air"), (1, ("red",), "sea"), (0, ("glass", "Anna", "Oslo"), "road")]
    assert pretrain.way_by(lines, GLASS, "rail") == "road"
    assert pretrain.way_by(lines, ("small", "red", "glass", "Anna", "Rome", "one"), "rail") == "sea"
    assert pretrain.way_by(lines, ("small", "blue", "glass", "Anna", "Rome", "one"), "rail") == "air"
    assert pretrain.way_by(lines[1:], ("small", "blue", "glass", "Anna", "Rome", "one"), "rail") is None
    assert pretrain.text_of(lines[:2]) == "Otherwise, use air. Second, use sea for red parcels."


def test_told_parcels_are_answered_right_and_untold_ones_by_chance() -> None:
    rng, untold = random.Random(2), Counter()  # type: random.Random, Counter[str]
    for _ in range(3000):
        messages, completion, _ = pretrain.draw_example(rng)
        stage = PACK if completion.startswith("[[ ## case ## ]]") else SORT
        assert pretraining.completion_for(((stage.target, completion.splitlines()[1]),)) == completion
        answer = completion.splitlines()[1]
        assert answer in stage.answers.values()
        if "use " not in messages[0]["content"] and stage is SORT:
            untold[answer] += 1
    assert min(untold.values()) > 0.18 * sum(untold.values())


def test_hints_say_what_the_first_line_says_that_names_a_word() -> None:
    lines: pretrain.Lines = [(3, (), "air"), (1, ("red", "over6"), "sea"), (0, ("red", "Lima"), "road")]
    hints = {name: pretrain.hint_of(lines, name, GLASS, "rail") for name in rules.ORDER}
    assert hints == dict.fromkeys(rules.ORDER, "") | {"colour": "road", "weight": "sea"}
    assert pretrain.hint_of([(0, ("rail",), "wood")], "carrier", GLASS, "rail") == "wood"


def scripted(rng: random.Random) -> pretrain.Drawn:
    lines: pretrain.Lines = [(0, ("glass",), "road"), (3, (), "air")]
    parcel = ("small", rng.choice(rules.ATTRIBUTES["colour"]), "glass", "Anna", "Oslo", "seven")
    values = {"parcel": rules.text_of(parcel)}
    hints = tuple((word, "road" if word == "glass" else "") for word in parcel)
    return pretrain.messages_for(SORT, pretrain.text_of(lines), values), "truck<|end|>", hints


def test_hints_stand_where_their_words_are_read(tmp_path: Path) -> None:
    recipe = replace(pretrain.RECIPE, tokenizer_examples=200, batch=2)
    tokenizer = training.tokenizer_of(recipe, 0)
    ((ids, wanted, kinds),) = training.rows_of(scripted, tokenizer, random.Random(0), 1)
    hinted = [at for at, kind in enumerate(kinds) if kind == training.HINT]
    assert [tokenizer.decode(ids[at - 1]) for at in hinted][2:] == ["glass", "Anna", "Oslo", "seven"]
    assert [tokenizer.decode(wanted[at]) for at in hinted][2:4] == ["road", pretraining.END]
    assert [wanted[at] == ids[at] for at, kind in enumerate(kinds) if kind == training.ANSWER] == [True, True]
    assert "glass" in tokenizer.decode(ids[: hinted[0]])  # the instruction names it too


def stopped(rng: random.Random) -> pretrain.Drawn:
    raise KeyboardInterrupt


def test_a_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    lessons = ((0, pretrain.draw_easy), (8, pretrain.draw_example))
    small = {"tokenizer_examples": 200, "batch": 2, "intermediate": 8, "warmup_steps": 2, "falling_steps": 4}
    recipe = replace(pretrain.RECIPE, lessons=lessons, save_every=8, **small)
    tokenizer = training.tokenizer_of(recipe, 0)
    training.train(recipe, tmp_path / "whole", 12, 0, tmp_path / "whole.pt")
    tokenizer.save_pretrained(tmp_path / "cut")
    broken = replace(recipe, lessons=((0, pretrain.draw_easy), (8, stopped)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "tokenizer_of", lambda *_: tokenizer)
        training.train(broken, tmp_path / "cut", 12, 0, tmp_path / "cut.pt")
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["done"] == 8
    training.train(recipe, tmp_path / "cut", 12, 0, tmp_path / "cut.pt")
    one, other = (Qwen3ForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- Lessons for the reflector ---------------------------------------------------------------------------------------


def test_lines_are_read_out_of_a_text() -> None:
    text = (
        "Answer the question. Second, use sea for large red parcels of glass to Oslo over six kilos by road. Do well. "
        "Otherwise, use air. Fourth, use air for red parcels. First, use road."
    )
    assert reflect.lines_in(text) == [
        (1, ("large", "red", "glass", "Oslo", "over6", "road"), "sea"),
        (3, (), "air"),
    ]
    rng = random.Random(0)
    for stage in STAGES:
        rule = rules.draw_rule(rng, stage, 3, 0.5)
        assert reflect.lines_in(" ".join(rules.sentences(rule))) == pretrain.lines_of(rule)


def test_lessons_show_a_failure_and_hold_nothing_withheld() -> None:
    rng = random.Random(3)
    for size in (2, 4, 4, 6) * 8:
        lesson = reflect.draw_lesson(rng, size)
        assert len(lesson.entries) == len(lesson.answers) == size
        assert any(lesson.answers)
        for entry, answer in zip(lesson.entries, lesson.answers, strict=True):
            assert entry["Feedback"] == "Right." if not answer else f'expected "{answer}".' in entry["Feedback"]
        words = [words for _, words, _ in reflect.lines_in(lesson.instruction)]
        pairs = itertools.combinations(itertools.chain.from_iterable(words), 2)
        assert all(rules.part_of(*pair) == "trained" for pair in pairs)
        assert reflect.is_right(f"Answer the question. {lesson.instruction}", lesson)
        assert reflect.obeyed(lesson.instruction, lesson) == 1.0
        assert reflect.obeyed(task.SEED_INSTRUCTION, lesson) == 0.25
    assert not reflect.is_right(lesson.instruction.replace("Otherwise", "Else"), lesson)


# --- The model that is shipped ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pretraining.load_model(pretrain.MODEL)
    torch.set_num_threads(before)


def followed(shipped: tuple[Any, Any], clauses: int, both: float, told: bool = True) -> float:
    rng, scores = random.Random(f"shipped/{clauses}/{both}"), []
    for _ in range(12):
        hidden = rules.draw_program(rng, (clauses, clauses), both, rules.is_trained)
        parcels = [rules.draw_parcel(rng, hidden) for _ in range(8)]
        instructions = pretrain.told(hidden) if told else [task.SEED_INSTRUCTION] * 2
        scores += pretrain.ask(*shipped, hidden, parcels, instructions)
    return sum(scores) / len(scores)


def test_the_shipped_model_follows_rules_and_two_conditions_in_one_clause_only_in_part(
    shipped: tuple[Any, Any],
) -> None:
    assert followed(shipped, 1, 0.0) > 0.95
    assert followed(shipped, 2, 0.0) > 0.9
    assert 0.4 < followed(shipped, 2, 1.0) < 0.9
    assert followed(shipped, 2, 0.0, told=False) < 0.5


def test_under_the_seed_instruction_the_shipped_model_answers_any_of_the_words(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    torch.manual_seed(0)
    values = {"parcel": TEXT, "carrier": "truck"}
    for stage in STAGES:
        asked = [pretrain.messages_for(stage, task.SEED_INSTRUCTION, values)] * 64
        texts = pretraining.generate(model, tokenizer, asked, temperature=1.0)
        counts = Counter(text.splitlines()[1] for text in texts)
        words = [counts[answer] for answer in stage.answers.values()]
        assert sum(words) >= 62  # one in three hundred is another word
        assert min(words) > 4


def test_the_shipped_model_is_small_and_reads_every_word_as_one_token(shipped: tuple[Any, Any]) -> None:
    words = [word for words in rules.ATTRIBUTES.values() for word in words]
    words += [word for stage in STAGES for pair in stage.answers.items() for word in pair]
    assert all(len(shipped[1](word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert sum(path.stat().st_size for path in pretrain.MODEL.iterdir()) < 4e6
