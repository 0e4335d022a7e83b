"""The tables of the results page, from the cells of its comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fst_optimizer.lab.tables import HeadAndRows, Rows
from fst_optimizer.lab.verdicts import (
    MOST_ROLLOUTS,
    REFERENCE,
    SUBJECT,
    Cell,
    Row,
    Verdict,
    evaluated_on_the_way,
    score_of,
    scores,
    share_ci,
    shares,
    verdicts_of,
)
from fst_optimizer.progress.tables import number
from fst_optimizer.stats import mean


def signed(found: Mapping[str, Any] | None) -> str:
    """`+0.051 [+0.010, +0.092]`, a difference with its interval; without bounds for one unit."""
    if found is None:
        return "-"
    middle = f"{found['mean']:+.3f}"
    return middle if found["low"] is None else f"{middle} [{found['low']:+.3f}, {found['high']:+.3f}]"


def share_text(found: Mapping[str, Any] | None) -> str:
    """`0.20 [0.10, 0.31]`; what was never reached makes it `at least 1.10 [0.80, no limit]`."""
    if found is None:
        return "-"
    high = "no limit" if found["high"] is None else f"{found['high']:.2f}"
    least = "at least " if found["median_at_least"] else ""
    return f"{least}{found['median']:.2f} [{found['low']:.2f}, {high}]"


def verdict_table(cells: Sequence[Cell]) -> HeadAndRows:
    """One row a method, one column a kind: FST less that method, and last its share of RL's rollouts."""
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        for one in verdicts_of(cell):
            name = "rollouts to RL's best, of RL's" if one.share else one.against
            found.setdefault(name, {})[cell.kind] = verdict_cell(one)
    kinds = [cell.kind for cell in cells]
    rows = [[name, *(by_kind.get(kind, "-") for kind in kinds)] for name, by_kind in found.items()]
    rows.sort(key=lambda row: row[0].startswith("rollouts to"))
    return (f"{SUBJECT} against", *(f"under {kind}" for kind in kinds)), rows


def verdict_cell(one: Verdict) -> str:
    """`won +0.051 [+0.010, +0.092]`, what is lost in bold."""
    text = share_text(one.found) if one.share else signed(one.found)
    return f"{'**lost**' if one.outcome == 'lost' else one.outcome} {text}"


def scores_by_kind(cells: Sequence[Cell]) -> HeadAndRows:
    """One row a method, one column a kind: the mean final score over rules, with the worst and the best of them."""
    methods = dict.fromkeys(method for cell in cells for method in cell.runs)
    rows = [[method, *(_spread(cell, method) for cell in cells)] for method in methods]
    return ("method", *(f"under {cell.kind}" for cell in cells)), rows


def _spread(cell: Cell, method: str) -> str:
    found = list(scores(cell, method).values()) if method in cell.runs else []
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{mean(found):.3f}{spread}" if found else "-"


def means_table(cell: Cell) -> HeadAndRows:
    """One row a method: what it cost, and how long it searched."""
    head = (
        *("method", "runs", "rollouts", "reflection calls", "seconds, of fst's", "KL to base", "population"),
        *("mixed groups", "accepted in cycle 1", "later"),
    )
    return head, [_means_row(cell, method) for method in cell.runs]


def _means_row(cell: Cell, method: str) -> list[str]:
    rows = cell.rows(method)

    def mean_of(value: Callable[[Row], float | None], digits: int) -> str:
        known = [found for row in rows if (found := value(row)) is not None]
        return number(mean(known) if known else None, digits)

    return [
        method,
        str(len(rows)),
        mean_of(lambda row: row["fast"] + row["slow"], 0),
        mean_of(lambda row: row["reflection_calls"], 0),
        number(seconds_share(cell, method), 2),
        mean_of(lambda row: row["kl_to_base"], 3),
        mean_of(lambda row: row["population"], 1),
        mean_of(lambda row: row["mixed"], 2),
        mean_of(lambda row: row["accepted_first"] if row["rounds"] else None, 1),
        mean_of(lambda row: row["accepted_later"] if row["rounds"] else None, 1),
    ]


def seconds_share(cell: Cell, method: str) -> float | None:
    """A method's seconds over FST's on the same rule: seconds of their own say what machine it was."""
    found = []
    for unit, rows in cell.runs[method].items():
        ours = cell.runs.get(SUBJECT, {}).get(unit, ())
        if ours:
            found.append(mean([row["seconds"] for row in rows]) / max(0.1, mean([row["seconds"] for row in ours])))
    return mean(found) if found else None


def scores_table(cell: Cell) -> HeadAndRows:
    """One row a rule, one column a method: final scores."""
    by_method = {method: scores(cell, method) for method in cell.runs}
    rows = [[unit, *(number(found.get(unit)) for found in by_method.values())] for unit in cell.units]
    return (cell.unit, *by_method), rows


def shares_table(cell: Cell) -> HeadAndRows | None:
    """One row a rule, one column a method: rollouts to RL's best over RL's. None without RL."""
    if REFERENCE not in cell.runs:
        return None
    methods = [method for method in cell.runs if method != REFERENCE and evaluated_on_the_way(cell, method)]
    by_method = {method: shares(cell, method) for method in methods}
    rows = [[unit, *(_share(found.get(unit)) for found in by_method.values())] for unit in cell.units]
    return (cell.unit, *by_method), [*rows, ["median", *(share_text(share_ci(cell, method)) for method in by_method)]]


def _share(found: tuple[float, bool] | None) -> str:
    return "-" if found is None else f"{'' if found[1] else '≥ '}{found[0]:.2f}"


def instructions_table(cells: Sequence[Cell], method: str = SUBJECT) -> HeadAndRows:
    """One row a run: what a method wrote, for each predictor."""
    rows: Rows = []
    for cell in cells:
        for row in cell.rows(method) if method in cell.runs else ():
            texts = " / ".join(f"{name}: {text}" for name, text in row["instructions"].items())
            rows.append([cell.kind, row["rule"], str(row["seed"]), number(score_of(row)), texts])
    return ("kind", "rule", "seed", "test", "instructions"), rows


def further_table(rows: Sequence[Row]) -> HeadAndRows:
    """One row a run at another cap: where it stands at the end, and the score on the way at every doubling."""
    head = ("family", "rule", "kind", "method", "seed", "cap", "validation on the way", "test after")
    return head, [
        [
            *(str(row[name]) for name in ("family", "rule", "kind", "method", "seed", "cap")),
            ", ".join(f"{point[1]:.2f} at {point[0]}" for point in doublings(row["curve"])),
            number(score_of(row)),
        ]
        for row in rows
    ]


def doublings(curve: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The last point of a curve, the first at half of its rollouts or more, at a quarter or more, and at an eighth."""
    end = curve[-1][0]
    places = [next(point for point in curve if point[0] >= end / parts) for parts in (8, 4, 2, 1)]
    return [point for number, point in enumerate(places) if point not in places[:number]]


def aim_text() -> str:
    """The aim for rollouts, in words."""
    return f"at most {MOST_ROLLOUTS:.2f} of {REFERENCE.upper()}'s"
