"""Letters: programs of one to three predictors, each with a hidden rule over a list of letters.

A variant says which rule each predictor hides and how long its lists are, by a name or spelled
(`drop_first.sort-rotate`), and after a `+` what the feedback gives away. The seed instruction reveals nothing.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import (
    KINDS,
    by_predictor,
    checked_size,
    distinct,
    feedback,
    numbered,
    spelled,
    split_by_hash,
    split_kind,
)

from .rules import (
    ALPHABET,
    OPERATIONS,
    READ,
    WRITTEN,
    Letters,
    Rule,
    apply,
    lengths_for,
    random_sentence,
    sentence,
    suits,
)

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SEED_INSTRUCTION = "Answer the question."
MAX_TOKENS = 48
"""Of one answer: the longest right one has 18 letters and about 15 tokens of format."""
SIZES = {"train": 512, "val": 256, "test": 512}
LARGEST_SIZE = 4096


@dataclass(frozen=True)
class Stage:
    """One predictor of a program."""

    name: str
    """Its attribute on the program, so its name in `named_predictors()`."""
    source: str
    """The field that it reads."""
    target: str
    """The field that it writes."""
    rule: Rule
    """What it should do; nothing in the seed program tells."""


@dataclass(frozen=True)
class Variant:
    """One task: a chain of stages and the lengths of the lists it starts from."""

    stages: tuple[Stage, ...]
    lengths: tuple[int, int]
    """Fewest and most letters in an example, both included."""


def chain(rules: tuple[Rule, ...], lengths: tuple[int, int]) -> Variant:
    """A variant of one to three stages: `letters -> middle -> inner -> answer`, the last always writing `answer`."""
    fields = (*("letters", "middle", "inner")[: len(rules)], "answer")
    names = ("first", "second", "third")
    return Variant(
        tuple(Stage(names[i], fields[i], fields[i + 1], rule) for i, rule in enumerate(rules)),
        lengths,
    )


DEFAULT_VARIANT = "pipeline"
VARIANTS: dict[str, Variant] = {
    "pipeline": chain((("drop_first",), ("sort", "rotate")), (6, 9)),
    "demo": chain((("drop_first",), ("sort_down", "rotate")), (5, 8)),
    "sort-rotate": chain((("sort", "rotate"),), (4, 7)),
    "held-out": chain((("swap_ends", "rotate"), ("drop_first", "sort")), (5, 8)),
    "three-stage": chain((("drop_first",), ("dedupe", "reverse"), ("swap_ends",)), (6, 9)),
    "reverse-drop": chain((("reverse", "drop_first"),), (5, 8)),
    "reverse-rotate": chain((("reverse", "rotate"),), (5, 8)),
    "dedupe-sort": chain((("dedupe", "sort"),), (5, 8)),
    "keep-double": chain((("reverse",), ("keep_odd", "double")), (5, 8)),
    "two-pairs": chain((("swap_ends", "drop_last"), ("rotate", "double")), (5, 8)),
}


class LettersProgram(dspy.Module):  # type: ignore[misc]
    """A chain of predictors; the prediction carries every stage's field, so that the metric can grade each."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        """Builds one `dspy.Predict` a stage, all with the seed instruction."""
        super().__init__()
        self.fields = tuple((stage.name, stage.source, stage.target) for stage in stages)
        for name, source, target in self.fields:
            signature = dspy.Signature(f"{source} -> {target}", SEED_INSTRUCTION)
            setattr(self, name, dspy.Predict(signature, max_tokens=MAX_TOKENS))

    def forward(self, letters: str) -> dspy.Prediction:
        """Runs the stages in order."""
        values = {"letters": letters}
        for name, source, target in self.fields:
            values[target] = getattr(self, name)(**{source: values[source]})[target]
        return dspy.Prediction(**{target: values[target] for _, _, target in self.fields})


@cache
def rule_named(rule: str) -> Variant:
    """The variant of that name, or the one that is spelled so, its lengths the first of `LENGTHS` that suit.

    Raises:
        ValueError: No such name or operation, too many of them, or lists too short or too long at any length.
    """
    if rule in VARIANTS:
        return VARIANTS[rule]
    stages = spelled("letters", rule, OPERATIONS, VARIANTS)
    lengths = lengths_for(stages)
    if lengths:
        return chain(stages, lengths)
    raise ValueError(
        f"rule {rule!r} of letters makes lists too short or too long; a predictor may read {READ[0]} to {READ[1]} "
        f"letters and write {WRITTEN[0]} to {WRITTEN[1]}: drop or double less often"
    )


def variant_named(variant: str | None) -> Variant:
    """The rules and lengths of a variant, whatever its kind of feedback; the default ones for None.

    Raises:
        ValueError: There is no such rule or kind.
    """
    return rule_named(split_kind(variant)[0] or DEFAULT_VARIANT)


def build_program(variant: str | None = None) -> LettersProgram:
    """The seed program of a variant: generic instructions, no LM attached."""
    return LettersProgram(variant_named(variant).stages)


def split_of(letters: Letters) -> str:
    """The split that a list belongs to, decided by its hash alone, so that no list is in two splits."""
    return split_by_hash(" ".join(letters))


def draw_letters(rng: random.Random, task: Variant) -> Letters:
    """A list of a length that the variant has."""
    return rng.choices(ALPHABET, k=rng.randint(*task.lengths))


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other lists of the same split.
        variant: The task; None means the default one.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    rule, kind = split_kind(variant)
    rule = rule or DEFAULT_VARIANT
    task = rule_named(rule)
    rules = tuple(stage.rule for stage in task.stages)
    rng = random.Random(f"{rule}/{split}/{seed}")

    def draws() -> Iterator[tuple[str | None, str]]:
        while True:
            letters = draw_letters(rng, task)
            text = " ".join(letters)
            yield text if split_of(letters) == split and suits(rules, letters) else None, text

    texts = distinct(draws(), size)
    name = rule if kind == KINDS[0] else f"{rule}+{kind}"
    rows = ({"letters": text, "answer": targets(task, text)["answer"], "variant": name} for text in texts)
    return numbered(split, seed, rows, "letters")


def targets(task: Variant, letters: str) -> dict[str, str]:
    """What each stage's field should hold, computed from the program's input and not from earlier answers."""
    values, right = letters.split(), {}
    for stage in task.stages:
        values = apply(stage.rule, values)
        right[stage.target] = " ".join(values)
    return right


def neighbours(letters: Letters) -> Counter[tuple[str, str]]:
    """The letters that stand side by side, and those at the ends with the end: `b a` has ` b`, `b a` and `a `."""
    return Counter(pairwise(["", *letters, ""]))


def grade(answer: object, target: str) -> float:
    """Half for the share of neighbours right, and half for the whole list right.

    The share is twice the neighbours that answer and target have in common, over those of both: `b c a` against
    `b a c d` has one of 4 and 5, so 2/9 and a grade of 1/9. Anything but text is 0. The first half gives training
    something to climb: of two wrong answers the one with fewer steps left earns more, as sorted letters do where they
    should be sorted and rotated. The second half keeps nearly right from looking like right.
    """
    if not isinstance(answer, str):
        return 0.0
    got, expected = answer.split(), target.split()
    if got == expected:
        return 1.0
    one, other = neighbours(got), neighbours(expected)
    return (one & other).total() / (one.total() + other.total())


def own_target(task: Variant, place: int, prediction: dspy.Prediction, right: dict[str, str]) -> tuple[str, str]:
    """What a stage was given and should make of it; where that is no list to work on, what the chain should have been.

    Args:
        task: What the stages should do.
        place: The stage's.
        prediction: The program's.
        right: What each field should hold, `letters` among them.
    """
    stage = task.stages[place]
    given = getattr(prediction, stage.source, None) if place else None
    letters = given.split() if isinstance(given, str) else []
    made = apply(stage.rule, letters) if len(letters) >= READ[0] else []
    return (" ".join(letters), " ".join(made)) if made else (right[stage.source], right[stage.target])


def another(task: Variant, letters: str, field: str, never: set[str]) -> str:
    """What is right for another list in this field, always the same for this one, and none of `never`."""
    rng = random.Random(f"another/{letters}")
    while True:
        found = targets(task, " ".join(draw_letters(rng, task)))[field]
        if found not in never:
            return found


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades a program by what its chain should have made, and a predictor by what it made of what it was given.

    The program's score is the mean over its stages, each against its target computed from the program's input: an early
    mistake costs twice. A predictor's own score and feedback are against what it should have made of its own input, so
    that an early mistake does not hide a right second step. The kind of feedback changes the texts and no score.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the program's score and all feedback.
        pred_trace: Not used.
    """
    task, kind = variant_named(example.variant), split_kind(example.variant)[1]
    places = {stage.name: place for place, stage in enumerate(task.stages)}
    right = targets(task, example.letters)

    def judge(name: str) -> tuple[float, str]:
        stage = task.stages[places[name]]
        answer = getattr(prediction, stage.target, None)
        given, target = own_target(task, places[name], prediction, {"letters": example.letters, **right})
        score = grade(answer, target)

        def other() -> str:
            return another(task, example.letters, stage.target, {target, right[stage.target]})

        return score, feedback(kind, score, answer, target, sentence(stage.rule), other, given)

    grades = [grade(getattr(prediction, field, None), text) for field, text in right.items()]
    return by_predictor(pred_name, places, judge, sum(grades) / len(grades))


def instructions(variant: str | None = None) -> dict[str, str]:
    """The right instruction of every predictor: its rule in words that the model was pretrained on."""
    return {stage.name: sentence(stage.rule) for stage in variant_named(variant).stages}


def answers(example: dspy.Example, variant: str | None = None) -> dict[str, dict[str, str]]:
    """What every predictor should write, by name and field, where all before it were right."""
    task = variant_named(variant or example.variant)
    right = targets(task, example.letters)
    return {stage.name: {stage.target: right[stage.target]} for stage in task.stages}


def probes(variant: str | None = None) -> list[str]:
    """The variants of one predictor with one operation each, all of which the model knows before any training."""
    return list(OPERATIONS)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for two CPU cores: a run of about three minutes."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values({"train.lr": 2e-3, "budget.max_cycles": 5})


def reflection_lm(variant: str | None = None) -> dspy.LM | None:
    """Who writes instructions: no LM where the feedback names the rule, else a small one.

    Where the feedback shows what was right, it is the reflector that `reflect.py` made; where it tells nothing but the
    score, one that writes sentences at random.
    """
    from fst_optimizer.evolve.task_lms import random_sentences, trained_reflector

    kind = split_kind(variant)[1]
    if kind == "scored":
        return random_sentences("letters", random_sentence)
    return None if kind == "told" else trained_reflector(Path(__file__).parent / "reflector")


def model() -> str:
    """The folder of the small model that `pretrain.py` made for these tasks."""
    return str(Path(__file__).parent / "model")
