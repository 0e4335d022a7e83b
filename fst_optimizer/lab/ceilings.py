"""`fst lab ceiling`: the ceiling of every run's curve, where it has one: see `ceiling`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab.ceiling import with_interval
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.curves import Point
from fst_optimizer.lab.subjects import finished_runs, told_of
from fst_optimizer.store.files import read_json

COMPARISON = "compare.json"


def curves_in(places: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows with the curves of comparisons (their JSON, or folders with one) and of run directories, each run once.

    Raises:
        UserError: a place has neither.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place in places:
        files = [place] if place.is_file() else sorted((*place.glob(COMPARISON), *place.glob(f"*/{COMPARISON}")))
        found = [row for path in files for row in _compared(path)] or _runs(place)
        for row in found:
            rows.setdefault((row["task"], row["method"], row["seed"]), row)
    return list(rows.values())


def measure(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its ceiling, or why none can be told."""
    return {**row, **with_interval([Point(*point) for point in row["curve"]])}


def _compared(path: Path) -> list[dict[str, Any]]:
    data = read_json(path)
    if not isinstance(data.get("runs"), list) or not isinstance(data.get("task"), str):
        raise UserError(f"{path} is no comparison: give what fst lab compare --out left, or run directories")
    return [_row(data["task"], run["method"], run["seed"], run["curve"]) for run in data["runs"]]


def _runs(place: Path) -> list[dict[str, Any]]:
    runs = map(read_run, finished_runs([place]))
    return [
        _row(run.result["task"], run.method, run.seed, [[one.rollouts, one.score, one.kl] for one in run.curve])
        for run in runs
    ]


def _row(task: str, method: str, seed: int, curve: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {**told_of(task, method, seed), "curve": curve}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One row a run."""
    head = ("rule", "method", "seed", "best score", "ceiling A", "95% interval", "half-way rollouts", "slope B")
    found = []
    for row in rows:
        best = max(point[1] for point in row["curve"])
        told = [row["why"].partition(":")[0], "", "", ""]
        if row["A"] is not None:
            told = [
                f"{row['A']:.3f}",
                f"[{row['low']:.3f}, {row['high']:.3f}]",
                f"{row['C_mid']:.0f}",
                f"{row['B']:.2f}",
            ]
        found.append([row["rule"], row["method"], str(row["seed"]), f"{best:.3f}", *told])
    return head, found
