"""The tables of a comparison, the same in the terminal and on the results page, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fst_optimizer.text import markdown

Rows = list[list[str]]
HeadAndRows = tuple[Sequence[str], Rows]
FormatCI = Callable[..., str]
"""How a mean with its interval is written."""


def format_ci(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.512 [0.480, 0.544]`; without bounds for one seed, `-` for nothing."""
    if found is None:
        return "-"
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["low"] is None else f"{mean} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def format_ci_short(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.512 ±0.032`, the same interval in less room."""
    if found is None or found["low"] is None:
        return format_ci(found, digits)
    return f"{found['mean']:.{digits}f} ±{found['high'] - found['mean']:.{digits}f}"


def method_table(data: Mapping[str, Any], format_ci: FormatCI = format_ci) -> HeadAndRows:
    """One row a method: means over seeds with 95% intervals."""
    columns = {
        "val before": ("val_score_before", 3),
        "val after": ("val_score_after", 3),
        "test before": ("test_score_before", 3),
        "test after": ("test_score_after", 3),
        "KL to base": ("kl_to_base", 3),
        "rollouts": ("training_rollouts", 0),
        "seconds": ("wall_s", 0),
    }
    return ("method", "seeds", *columns), [
        [method, str(len(found["seeds"])), *(format_ci(found[name], digits) for name, digits in columns.values())]
        for method, found in data["methods"].items()
    ]


def against_table(against: Mapping[str, Any], format_ci: FormatCI = format_ci) -> HeadAndRows:
    """One row a method: what it took to reach RL's best."""
    columns = {
        "rollouts": ("rollouts", 0),
        "of RL's": ("ratio", 2),
        "KL there": ("kl", 4),
        "of RL's KL": ("kl_ratio", 2),
    }
    return ("method", "reached", *columns), [
        [
            method,
            f"{found['reached']} of {found['of']}",
            *(format_ci(found[name], digits) for name, digits in columns.values()),
        ]
        for method, found in against.items()
    ]


def sweep_table(data: Mapping[str, Any]) -> HeadAndRows:
    """One row a method and learning rate."""
    return ("method", "lr", "score", "rollouts", ""), [
        [
            method,
            f"{entry['lr']:g}",
            f"{entry['val_score_after']:.3f}",
            f"{entry['settled_rollouts']:.0f}",
            "picked" if entry["lr"] == data["picked"][method] else "",
        ]
        for method, entries in data["means"].items()
        for entry in entries
    ]


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """For a page; cells are text, whatever they hold."""
    lines = [map(markdown, head), ["---"] * len(head), *(map(markdown, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
