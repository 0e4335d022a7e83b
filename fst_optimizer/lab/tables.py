"""Numbers for people: the same words in the terminal and on the results page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[list[str]]
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


def number(value: float | None, digits: int = 3) -> str:
    """A number, or `-`."""
    return "-" if value is None else f"{value:.{digits}f}"


METHOD_HEAD = (
    "method",
    "seeds",
    "val before",
    "val after",
    "test before",
    "test after",
    "KL to base",
    "rollouts",
    "seconds",
)


def method_rows(data: Mapping[str, Any], format_ci: FormatCI = format_ci) -> Rows:
    """One row a method: means over seeds with 95% intervals."""
    return [
        [
            method,
            str(len(found["seeds"])),
            *(format_ci(found[name]) for name in ("val_score_before", "val_score_after")),
            *(format_ci(found[name]) for name in ("test_score_before", "test_score_after", "kl_to_base")),
            format_ci(found["training_rollouts"], 0),
            format_ci(found["wall_s"], 0),
        ]
        for method, found in data["methods"].items()
    ]


AGAINST_HEAD = ("method", "reached", "rollouts", "of RL's", "KL there", "of RL's KL")


def against_rows(against: Mapping[str, Any], format_ci: FormatCI = format_ci) -> Rows:
    """One row a method: what it took to reach RL's best."""
    return [
        [
            method,
            f"{found['reached']} of {found['of']}",
            format_ci(found["rollouts"], 0),
            format_ci(found["ratio"], 2),
            format_ci(found["kl"], 4),
            format_ci(found["kl_ratio"], 2),
        ]
        for method, found in against.items()
    ]


PAIR_HEAD = ("method", "seed", "RL's best", "RL's rollouts", "RL's KL", "rollouts", "ratio", "KL", "ratio of KL")


def pair_rows(against: Mapping[str, Any]) -> Rows:
    """One row a method and seed, for those who want to check."""
    return [
        [
            method,
            str(pair["seed"]),
            number(pair["target"]),
            str(pair["rl_rollouts"]),
            number(pair["rl_kl"], 4),
            "never" if pair["rollouts"] is None else str(pair["rollouts"]),
            number(pair["ratio"], 2),
            number(pair["kl"], 4),
            number(pair["kl_ratio"], 2),
        ]
        for method, found in against.items()
        for pair in found["pairs"]
    ]


SIGNAL_HEAD = ("method", "entropy at first", "entropy at last", "flat groups at first", "flat groups at last")


def signal_rows(data: Mapping[str, Any]) -> Rows:
    """One row a method that trains: how much its rollouts still differed."""
    names = ("entropy_start", "entropy_end", "flat_start", "flat_end")
    return [
        [method, *(format_ci(found["signal"][name], 2) for name in names)]
        for method, found in data["methods"].items()
        if found["signal"]
    ]


def rich_table(title: str, head: Sequence[str], rows: Rows) -> Table:
    """For the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """For a page."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
