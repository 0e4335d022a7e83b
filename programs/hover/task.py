"""HoVer-like claim verification: search, note, search again, and say whether the claim holds.

The score is the share of gold documents that all searches together brought, half of it only if the verdict is right.
A query predictor is judged on what its search brought, a summary on the names that it passed on to the next one.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import by_predictor, checked_size, named, numbered, split_by_hash

from .claims import Claim, draw_claims
from .corpus import corpus_at
from .grading import judge, run_of
from .program import HoverProgram
from .real import read_claims

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

DATA_VARIABLE = "FST_HOVER_DATA"
CORPUS_VARIABLE = "FST_HOVER_CORPUS"
SIZES = {"train": 512, "val": 128, "test": 256}
LARGEST_SIZE = 1024


@dataclass(frozen=True)
class Variant:
    """One task."""

    hops: int
    """Searches, and documents that a claim needs."""
    verdict: bool = True
    """False: retrieval alone is scored."""
    real: bool = False
    """HoVer's claims and a corpus of one's own, in place of the invented ones."""


DEFAULT_VARIANT = "3-hop"
VARIANTS = {
    f"{'real-' if real else ''}{hops}-hop{'' if verdict else '-retrieval'}": Variant(hops, verdict, real)
    for real in (False, True)
    for hops in (2, 3, 4)
    for verdict in (True, False)
}
VARIANTS |= {"real": VARIANTS["real-3-hop"], "real-retrieval": VARIANTS["real-3-hop-retrieval"]}


def variant_named(variant: str | None) -> Variant:
    """The variant of that name, the default one for None. Raises ValueError for an unknown name."""
    return named("hover", VARIANTS, variant or DEFAULT_VARIANT)


def build_program(variant: str | None = None) -> HoverProgram:
    """The seed program of a variant, no LM attached. Indexes the corpus; ValueError if that cannot be done."""
    task = variant_named(variant)
    return HoverProgram(task.hops, corpus_path(task), task.verdict)


def corpus_path(task: Variant) -> str | None:
    """Where the corpus is; None for the invented one."""
    return named_path(CORPUS_VARIABLE, "a JSONL file of title and text") if task.real else None


def named_path(variable: str, what: str) -> str:
    """An environment variable's value. Raises ValueError where it is not set."""
    path = os.environ.get(variable)
    if not path:
        raise ValueError(f"{variable} is not set: the variants with real data need it to name {what}")
    return path


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`. Invented claims are told apart by their first entity, HoVer's by their text.
        size: How many; None means the split's default size, or all of HoVer's if those are fewer.
        seed: Draws other claims of the same split.
        variant: The task; None means the default one.
    """
    task = variant_named(variant)
    claims = real_claims(task, split, seed) if task.real else None
    size = checked_size(split, size, SIZES, LARGEST_SIZE if claims is None else len(claims))
    claims = draw_claims(split, size, task.hops, seed) if claims is None else claims[:size]
    rows = (
        {"claim": claim.text, "titles": list(claim.titles), "label": claim.label, "variant": variant or DEFAULT_VARIANT}
        for claim in claims
    )
    return numbered(split, seed, rows, "claim")


def real_claims(task: Variant, split: str, seed: int) -> list[Claim]:
    """HoVer's claims of a split, in a seeded order."""
    path = Path(named_path(DATA_VARIABLE, "HoVer's JSON file, or a folder of them"))
    claims = [claim for claim in read_claims(path, task.hops) if split_by_hash(claim.text) == split]
    random.Random(f"hover/{split}/{seed}").shuffle(claims)
    return claims


def reference(example: dspy.Example) -> dspy.Prediction:
    """What the program returns when every search brings the document that is next, and the verdict is right."""
    titles = list(example.titles)
    verdict = {"verdict": example.label} if variant_named(example.variant).verdict else {}
    return dspy.Prediction(queries=titles, retrieved=[[title] for title in titles], summaries=titles[1:], **verdict)


def predictor_names(task: Variant) -> list[str]:
    """The program's predictors, in the order in which they run."""
    turns = [name for hop in range(1, task.hops) for name in (f"query{hop}", f"summarize{hop}")]
    return [*turns, f"query{task.hops}", *(["verdict"] if task.verdict else [])]


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades the documents that were found, and the verdict.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as nothing found.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the program's score and all feedback.
        pred_trace: Not used.
    """
    task = variant_named(example.variant)
    run, corpus = run_of(example, prediction, task.hops, task.verdict), corpus_at(corpus_path(task))
    return by_predictor(pred_name, predictor_names(task), lambda name: judge(name, run, corpus), run.score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for an 8B model on one 80 GB GPU. Untested."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values(
        {
            "fast.anchor_size": 32,
            "fast.max_rollouts": 384,
            "rollout.batch_size": 16,
            "rollout.timeout_s": 300.0,  # a rollout is up to eight calls, one after another
            "train.lr": 2e-5,
            "train.kl_coef": 1e-3,
            "train.gradient_checkpointing": True,
            "eval.candidates": 2,
            "budget.max_cycles": 10,
        }
    )
