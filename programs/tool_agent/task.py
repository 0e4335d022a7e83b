"""A ReAct agent that looks goods up in a table and calculates with what it found.

The score is 1 for the right number. A wrong one earns less than a half: for the records that were seen, and for the
right number if it was calculated but not answered.
"""

from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import by_predictor, checked_size, named, numbered

from .goods import records
from .grading import Run, judge_extract, judge_react, turns_of
from .questions import TEMPLATES, draw_questions
from .tools import calculator, lookup

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SEED_INSTRUCTION = "Answer the question."
MAX_TURNS = 8
"""Tool calls, the last to `finish` included; three look-ups, a calculation and the end take five."""
SIZES = {"train": 512, "val": 128, "test": 256}
LARGEST_SIZE = 512
DEFAULT_VARIANT = "2-lookup"
VARIANTS = {f"{lookups}-lookup": lookups for lookups in TEMPLATES}
JUDGES = {"react": judge_react, "extract.predict": judge_extract}
"""By predictor, under the names that `dspy.ReAct` gives them."""


def lookups_of(variant: str | None) -> int:
    """The look-ups that a variant's questions need, the default one's for None. ValueError for an unknown name."""
    return named("tool_agent", VARIANTS, variant or DEFAULT_VARIANT)


def build_program(variant: str | None = None) -> dspy.ReAct:
    """The seed agent, no LM attached; the same for every variant."""
    lookups_of(variant)
    signature = dspy.Signature("question -> answer: float", SEED_INSTRUCTION)
    return dspy.ReAct(signature, tools=[lookup, calculator], max_iters=MAX_TURNS)


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other questions of the same split.
        variant: The task; None means the default one.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    rows = (
        {
            "question": question.text,
            "answer": question.answer,
            "names": list(question.names),
            "variant": variant or DEFAULT_VARIANT,
        }
        for question in draw_questions(split, size, lookups_of(variant), seed)
    )
    return numbered(split, seed, rows, "question")


def reference(example: dspy.Example) -> dspy.Prediction:
    """What the agent returns that looks everything up, calculates and ends."""
    calls: list[tuple[str, dict[str, str], object]]
    calls = [("lookup", {"name": name}, records()[name.lower()]) for name in example.names]
    calls.append(("calculator", {"expression": f"{example.answer}"}, calculator(f"{example.answer}")))
    calls.append(("finish", {}, "Completed."))
    trajectory: dict[str, object] = {}
    for place, (tool, arguments, observation) in enumerate(calls):
        trajectory |= {f"thought_{place}": "", f"tool_name_{place}": tool, f"tool_args_{place}": arguments}
        trajectory[f"observation_{place}"] = observation
    return dspy.Prediction(trajectory=trajectory, reasoning="", answer=example.answer)


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades the answer, and where it is wrong the way to it.

    Args:
        example: One from `load`.
        prediction: The agent's prediction; a missing trajectory counts as no calls.
        trace: Not used.
        pred_name: `react` or `extract.predict`: its own score and feedback. None: the program's score, all feedback.
        pred_trace: Not used.
    """
    turns = turns_of(getattr(prediction, "trajectory", None))
    run = Run(example.answer, tuple(example.names), getattr(prediction, "answer", None), turns)
    return by_predictor(pred_name, JUDGES, lambda name: JUDGES[name](run), run.score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for an 8B model on one 80 GB GPU. Untested."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values(
        {
            "fast.anchor_size": 32,
            "fast.max_rollouts": 384,
            "rollout.batch_size": 16,
            "rollout.timeout_s": 300.0,  # a rollout is up to nine calls, one after another
            "train.lr": 2e-5,
            "train.kl_coef": 1e-3,
            "train.average": "rollout",  # else those that call more tools weigh more
            "train.gradient_checkpointing": True,
            "eval.candidates": 2,
            "budget.max_cycles": 10,
        }
    )
