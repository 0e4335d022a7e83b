"""`fst lab decompose`: what the prompt learned and what the weights learned, on the same test examples.

Four cells a run: base or trained weights under the task's own or the evolved instructions. Source: arXiv 2605.12484.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fst_optimizer.finished.recorded import recorded_size
from fst_optimizer.lab.measuring import Bench, exam_on
from fst_optimizer.lab.subjects import Subject
from fst_optimizer.lab.tables import format_ci
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.stats import mean, mean_ci

CELLS = {"base": (False, False), "prompt": (False, True), "weights": (True, False), "both": (True, True)}
"""Cell -> whether it has the trained weights, whether it has the evolved instructions."""
GAINS = {
    "prompt_gain": {"prompt": 1, "base": -1},
    "weights_gain": {"weights": 1, "base": -1},
    "both_gain": {"both": 1, "base": -1},
    "interaction": {"both": 1, "prompt": -1, "weights": -1, "base": 1},
}
"""Name -> the cells that are added and taken away, example by example."""


def cells(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A run's four means and what is between them, from the scores of the same examples in every cell.

    A gain has the 95% Student-t interval of the differences, paired by example. `interaction` is what both bring
    together beyond the sum of what each brings alone.
    """
    gains = {
        name: mean_ci(
            sum(sign * one for sign, one in zip(signs.values(), row, strict=True))
            for row in zip(*(scores[cell] for cell in signs), strict=True)
        )
        for name, signs in GAINS.items()
    }
    return {"examples": len(scores["base"]), **{cell: mean(scores[cell]) for cell in CELLS}, **gains}


def measure(bench: Bench, test_size: int | None) -> dict[str, Any]:
    """A run's row, on as many test examples as the run itself was scored on, unless `test_size` says otherwise."""
    subject = bench.subject
    result = subject.run.result
    own, size = seed_texts(subject.task.build_program()), test_size or recorded_size(subject.finished.config, "test")
    exams = {
        evolved: exam_on(subject.task, texts, size) for evolved, texts in ((False, own), (True, evolved_texts(subject)))
    }
    scores = {
        cell: bench.scores(exams[evolved], subject.finished.version if trained else 0)[""]
        for cell, (trained, evolved) in CELLS.items()
    }
    return {
        **subject.row,
        **cells(scores),
        "test_score_after": result["test_score_after"],
        "policy_version": subject.finished.version,
        "kl_to_base": result["kl_to_base"],
        "rollouts": result["rollouts"]["fast"] + result["rollouts"]["slow"],
        "reflection_calls": result["reflection_calls"],
    }


def evolved_texts(subject: Subject) -> dict[str, str]:
    """The instructions that a run came to."""
    return dict(subject.run.result["candidate"])


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One row a run."""
    head = ("rule", "method", "seed", "base", "prompt only", "weights only", "both", "interaction")
    found = []
    for row in rows:
        means = [f"{row[cell]:.3f}" for cell in CELLS]
        found.append([row["rule"], row["method"], str(row["seed"]), *means, format_ci(row["interaction"])])
    return head, found
