"""Papillon-like delegation: the policy asks a frozen model for advice without passing on who is asking.

The score is quality times privacy: the share of what the reply must have, times the share of private facts that the
prompt for the frozen model kept back.
"""

from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import by_predictor, checked_size, named, numbered

from .advice import TOPICS
from .facts import Private, draw_requests
from .grading import Run, judge_answer, judge_craft, judge_respond
from .offline import NAME
from .program import PapillonProgram

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SIZES = {"train": 512, "val": 128, "test": 256}
LARGEST_SIZE = 4096
DEFAULT_VARIANT = "note"
VARIANTS = {"short": 2, "note": 3, "long": 5}
"""Private facts in a request."""
JUDGES = {"craft": judge_craft, "answer_untrusted": judge_answer, "respond": judge_respond}
"""By predictor."""


def facts_of(variant: str | None) -> int:
    """The private facts in a variant's requests, the default one's for None. ValueError for an unknown name."""
    return named("papillon", VARIANTS, variant or DEFAULT_VARIANT)


def build_program(variant: str | None = None) -> PapillonProgram:
    """The seed program, the same for every variant: only the frozen predictor has an LM."""
    facts_of(variant)
    return PapillonProgram()


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other requests of the same split.
        variant: The task; None means the default one.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    rows = (
        {
            "request": asked.text,
            "topic": asked.topic,
            "private": [[fact.kind, fact.text] for fact in asked.private],
            "fill": [[fact.kind, fact.text] for fact in asked.fill],
            "variant": variant or DEFAULT_VARIANT,
        }
        for asked in draw_requests(split, size, facts_of(variant), seed)
    )
    return numbered(split, seed, rows, "request")


def reference(example: dspy.Example) -> dspy.Prediction:
    """What the program returns that tells the trouble alone, and signs the advice that it gets."""
    topic = TOPICS[example.topic]
    signed = ", ".join(text for _, text in example.fill)
    return dspy.Prediction(
        prompt=f"{topic.trouble} What can be done about it, step by step?",
        answer=topic.advice,
        reply=f"{topic.trouble} {topic.advice} {signed}",
    )


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades the reply by what it has, and the prompt by what it does not have.

    Args:
        example: One from `load`.
        prediction: The program's prediction; without a prompt, everything counts as leaked.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the program's score and all feedback.
        pred_trace: Not used.
    """
    private, fill = (tuple(Private(*fact) for fact in facts) for facts in (example.private, example.fill))
    written = (getattr(prediction, name, None) for name in ("prompt", "answer", "reply"))
    run = Run(TOPICS[example.topic].points, private, fill, *written)
    return by_predictor(pred_name, JUDGES, lambda name: JUDGES[name](run), run.score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for an 8B model on one 80 GB GPU. Untested."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values(
        {
            "predictors.answer_untrusted": "neither",
            f"budget.prices.{NAME}": (0.0, 0.0),
            "fast.anchor_size": 32,
            "fast.max_rollouts": 384,
            "rollout.batch_size": 16,
            "rollout.timeout_s": 300.0,  # a frozen model behind an API may be slow
            "train.lr": 2e-5,
            "train.kl_coef": 1e-3,
            "train.gradient_checkpointing": True,
            "eval.candidates": 2,
            "budget.max_cycles": 10,
        }
    )
