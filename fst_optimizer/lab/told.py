"""What each method of a comparison is told: the part of the results page that says what a lead is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fst_optimizer.evolve.reflection_lm import EXTRACTIVE
from fst_optimizer.lab.methods import SFT, plain
from fst_optimizer.lab.verdicts import Cell, kind_order

KINDS_SAY = {
    "told": "the rule, as a sentence",
    "shown": "what was got and what was right",
    "scored": "the score alone",
    "shuffled": "what was got, and the right answer of another example (a control)",
}
LEARNS = {
    "fst": "prompts and weights, in turns",
    "once": "prompts once, then weights under that one prompt",
    "sequential": "prompts with half of the rollouts, then weights",
    "gepa": "prompts",
    "rl": "weights",
    "sft": "weights, from right answers",
    "dspy-gepa": "prompts, by DSPy's GEPA",
    "dspy-grpo": "weights, by DSPy's GRPO",
    "dspy-together": "prompts, then weights, by DSPy's BetterTogether",
}


def reflector_of(rows: Sequence[Any]) -> str:
    """Who wrote the instructions in these runs."""
    names = dict.fromkeys(row["reflector"] or EXTRACTIVE for row in rows)
    return ", ".join(names)


def told_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """One row a method: what it learns, what it reads under each kind and who writes its prompts, what else it got."""
    kinds = sorted({cell.kind for cell in cells}, key=kind_order)
    methods = list(dict.fromkeys(method for cell in cells for method in cell.runs))
    table = []
    for method in methods:
        by_kind = []
        for kind in kinds:
            rows = [row for cell in cells if cell.kind == kind and method in cell.runs for row in cell.rows(method)]
            reads = [row for row in rows if row["reads_feedback"]]
            blind = "right answers" if plain(method) == SFT else "the score alone"
            by_kind.append(f"feedback; {reflector_of(reads)}" if reads else blind if rows else "-")
        rows = [row for cell in cells if method in cell.runs for row in cell.rows(method)]
        given = ["right answers"] * (plain(method) == SFT)
        given += ["other instructions to start from"] * any(row["given_instructions"] for row in rows)
        table.append([method, LEARNS.get(plain(method), "-"), *by_kind, ", ".join(given) or "nothing else"])
    return ["method", "learns", *(f"under {kind}" for kind in kinds), "given besides"], table


def seed_instructions(cells: Sequence[Cell]) -> list[str]:
    """The tasks' own texts, from which programs start, each once."""
    found: dict[str, None] = {}
    for cell in cells:
        for method in cell.runs:
            for row in cell.rows(method):
                own = None if row["given_instructions"] else row["seed_instructions"]
                found |= dict.fromkeys((own or {}).values())
    return list(found)


def own_settings_of(settings: dict[str, Any], methods: Sequence[str]) -> list[list[str]]:
    """Method and the settings in which it differs from most of the methods of its family."""
    rows = []
    for family, by_method in settings.items():
        known = {method: by_method[method] for method in methods if method in by_method}
        shared = set.intersection(*({*map(_pair, one.items())} for one in known.values())) if known else set()
        for method, one in known.items():
            own = [f"{name}={value}" for name, value in one.items() if _pair((name, value)) not in shared]
            if own:
                rows.append([family, method, ", ".join(own)])
    return rows


def _pair(item: tuple[str, Any]) -> tuple[str, str]:
    return item[0], repr(item[1])
