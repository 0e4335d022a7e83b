"""Parcels: a predictor sorts a parcel to a carrier, perhaps another one packs it, each by a list of conditions.

A variant says which list each predictor hides, and what the feedback tells. The seed instruction reveals nothing, and
every answer is one of four words, so that all of them are found by chance: what is said of a list, or learned of it,
shows in the score at once.
"""

import random
from collections.abc import Iterator
from functools import cache
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
    split_by_hash,
    split_kind,
)

from . import rules
from .rules import PACK, STAGES, Parcel, Rule, Rules, Stage

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SEED_INSTRUCTION = "Answer the question."
MAX_TOKENS = 16
"""Of one answer: a right one has 4."""
SIZES = {"train": 512, "val": 256, "test": 512}
LARGEST_SIZE = 1024
"""There are 62,208 parcels, a quarter of them for the test: enough also where a clause of two conditions decides."""

DEFAULT_VARIANT = "depot"
VARIANTS: dict[str, str] = {
    "depot": "Rome_sea-tools_rail-road.red_wood-over6_metal-card",
    "harbour": "glass_air-Lima_sea-over6_rail-road.sea_metal-small_card-blue_cloth-wood",
    "large-glass": "large_glass_sea-Hugo_air-rail.green_Delhi_wood-rail_cloth-metal",
    "sorting": "Cairo_road-blue_sea-rail",
    "single": "white_air-rail.books_card-cloth",
}
"""Rules by name, spelled as `rules.read` has them."""
SEED = 0
DEV: tuple[str, ...] = (
    "tools_air-red_Emma_rail-road.green_wood-Kyoto_metal-brown_card-cloth",
    "Emma_road-huge_air-small_rail-sea.brown_Anna_wood-Greta_Delhi_card-cloth",
    "toys_air-tools_under4_road-rail.small_wood-huge_rail_card-cloth",
    "Anna_air-Rome_sea-Oslo_rail-road.Delhi_wood-huge_books_card-Lima_under7_cloth-metal",
    "white_Hugo_air-huge_sea-Lima_road-rail.blue_books_wood-glass_Cairo_metal-card",
)
"""`rules.withheld_programs("dev", SEED)`: what settings are chosen on."""
PROOF: tuple[str, ...] = (
    "fruit_sea-Hugo_air-rail.books_wood-Hugo_cloth-under4_metal-card",
    "Greta_air-Lima_road-Felix_sea-rail.white_Lima_card-books_wood-cloth",
    "green_rail-Felix_air-sea.brown_Rome_wood-over3_cloth-metal",
    "small_rail-books_Oslo_road-Boris_air-sea.books_Greta_card-David_cloth-Boris_metal-wood",
    "fruit_rail-Kyoto_air-red_road-sea.Boris_metal-Hugo_cloth-wood",
)
"""`rules.withheld_programs("proof", SEED)`: nothing is ever chosen on these."""


@cache
def rules_named(rule: str | None) -> Rules:
    """The rules of that name, or as they are spelled; the default ones for None.

    Raises:
        ValueError: It is neither.
    """
    name = rule or DEFAULT_VARIANT
    try:
        return rules.read(VARIANTS.get(name, name))
    except ValueError as error:
        raise ValueError(
            f"unknown rule {name!r} of parcels; choose one of {', '.join(VARIANTS)}, or spell one as "
            f"{VARIANTS[DEFAULT_VARIANT]}: {error}"
        ) from error


def task_named(variant: str | None) -> tuple[dict[str, tuple[Stage, Rule]], str]:
    """What each predictor should do, by its name, and the kind of feedback."""
    rule, kind = split_kind(variant)
    return {stage.name: (stage, own) for stage, own in zip(STAGES, rules_named(rule), strict=False)}, kind


# --- Programs --------------------------------------------------------------------------------------------------------


class ParcelsProgram(dspy.Module):  # type: ignore[misc]
    """Sorts, and perhaps packs; the prediction carries every answer, so that the metric can grade each."""

    def __init__(self, packs: bool) -> None:
        """Builds one `dspy.Predict` a stage, all with the seed instruction."""
        super().__init__()
        self.stages = STAGES if packs else STAGES[:1]
        for stage in self.stages:
            signature = dspy.Signature(f"{', '.join(stage.sources)} -> {stage.target}", SEED_INSTRUCTION)
            setattr(self, stage.name, dspy.Predict(signature, max_tokens=MAX_TOKENS))

    def forward(self, parcel: str) -> dspy.Prediction:
        """Runs the stages in order."""
        values, answers = {"parcel": parcel}, {}
        for stage in self.stages:
            told = {source: values[source] for source in stage.sources}
            answers[stage.target] = values[stage.target] = getattr(self, stage.name)(**told)[stage.target]
        return dspy.Prediction(**answers)


def build_program(variant: str | None = None) -> ParcelsProgram:
    """The seed program of a variant: generic instructions, no LM attached."""
    return ParcelsProgram(PACK.name in task_named(variant)[0])


# --- Data ------------------------------------------------------------------------------------------------------------


def split_of(parcel: Parcel) -> str:
    """The split that a parcel belongs to, decided by its hash alone, so that none is in two splits."""
    return split_by_hash(rules.text_of(parcel))


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other parcels of the same split.
        variant: The task; None means the default one. Kinds of feedback have the same examples.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    rule, kind = split_kind(variant)
    hidden = rules_named(rule)
    name = (rule or DEFAULT_VARIANT) if kind == KINDS[0] else f"{rule or DEFAULT_VARIANT}+{kind}"
    rng = random.Random(f"parcels/{rules.spelled(hidden)}/{split}/{seed}")

    def draws() -> Iterator[tuple[str | None, Parcel]]:
        while True:
            parcel = rules.draw_parcel(rng, hidden)
            yield rules.text_of(parcel) if split_of(parcel) == split else None, parcel

    rows = (
        {"parcel": rules.text_of(parcel), **targets(hidden, parcel), "variant": name}
        for parcel in distinct(draws(), size)
    )
    return numbered(split, seed, rows, "parcel")


def targets(hidden: Rules, parcel: Parcel) -> dict[str, str]:
    """What each predictor's field should hold, computed from the program's input and not from earlier answers."""
    taken = zip(STAGES, rules.applied(hidden, parcel), strict=False)
    return {stage.target: stage.answers[way] for stage, way in taken}


# --- Metric ----------------------------------------------------------------------------------------------------------


def grade(answer: object, target: str) -> float:
    """1.0 for the right word, else 0.0."""
    return float(isinstance(answer, str) and answer.strip() == target)


def another(parcel: str, hidden: Rules) -> Parcel:
    """Another parcel of the same task, always the same for this one: its answers are shown in the kind `shuffled`.

    They may be right for this one too: of four words, one that is never right would tell.
    """
    return rules.draw_parcel(random.Random(f"parcels/shuffled/{parcel}"), hidden)


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades every predictor against its own target, computed from the program's input.

    No sentence of a rule holds a word of an answer, or a parcel's whole text: it names nothing of the instance.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the mean of the scores and all feedback.
        pred_trace: Not used.
    """
    hidden, kind = task_named(example.variant)
    own = tuple(rule for _, rule in hidden.values())
    right = targets(own, rules.parcel_in(example.parcel))

    def judge(name: str) -> tuple[float, str]:
        stage, rule = hidden[name]
        answer, target = getattr(prediction, stage.target, None), right[stage.target]
        score = grade(answer, target)

        def other() -> str:
            return targets(own, another(example.parcel, own))[stage.target]

        return score, feedback(kind, score, answer, target, " ".join(rules.sentences(rule)), other)

    return by_predictor(pred_name, hidden, judge)


# --- What commands ask of the task -----------------------------------------------------------------------------------


def instructions(variant: str | None = None) -> dict[str, str]:
    """The right instruction of every predictor: its rule in sentences that the model was pretrained on."""
    hidden, _ = task_named(variant)
    return {name: " ".join(rules.sentences(rule)) for name, (_, rule) in hidden.items()}


def answers(example: dspy.Example, variant: str | None = None) -> dict[str, dict[str, str]]:
    """The right output of every predictor."""
    hidden, _ = task_named(variant or example.variant)
    right = targets(tuple(rule for _, rule in hidden.values()), rules.parcel_in(example.parcel))
    return {name: {stage.target: right[stage.target]} for name, (stage, _) in hidden.items()}


PROBES = 12


def probes(variant: str | None = None) -> list[str]:
    """Rules of one clause and one condition, none of the variant's own conditions, for a program of the same stages."""
    hidden, _ = task_named(variant)
    used = {word for _, rule in hidden.values() for word in rule.words}
    rng = random.Random(f"parcels/probes/{len(hidden)}")
    found: list[str] = []
    while len(found) < PROBES:
        drawn = rules.draw_program(rng, (1,) * len(hidden), 0.0, lambda rule: used.isdisjoint(rule.words))
        name = rules.spelled(drawn)
        if name not in found:
            found.append(name)
    return found


def random_instruction(rng: random.Random) -> str:
    """A rule in sentences, drawn from all that there are, for one predictor or the other: it knows not which."""
    stage = rng.choice(STAGES)
    return " ".join(rules.sentences(rules.draw_rule(rng, stage, rng.choice((1, 2, 3)), rules.BOTH)))


def reflection_lm(variant: str | None = None) -> dspy.LM | None:
    """Who writes instructions: no LM where the feedback names the rule, else a small one.

    Where the feedback shows what was right, it is the reflector that `reflect.py` made; where it tells nothing but the
    score, one that writes sentences at random.
    """
    from fst_optimizer.evolve.task_lms import random_sentences, trained_reflector

    kind = task_named(variant)[1]
    if kind == "scored":
        return random_sentences("parcels", random_instruction)
    return None if kind == "told" else trained_reflector(Path(__file__).parent / "reflector")


def model() -> str:
    """The folder of the small model that `pretrain.py` made for these tasks."""
    return str(Path(__file__).parent / "model")


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for two CPU cores: about 4,000 rollouts.

    The rate is the better of 1e-3 and 3e-3 for RL on the first program of `DEV`.
    """
    from fst_optimizer import FSTConfig

    task_named(variant)
    return FSTConfig().with_values({"train.lr": 3e-3, "budget.max_cycles": 10})
