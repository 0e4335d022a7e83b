"""The experiments' sections of the results page: a table and a figure from the rows of each, whoever wrote them.

Rows are `{task, method, rule, seed, ...}`: texts say what a number is of, numbers are what was measured, and an
interval counts with its mean. Units are rules, as everywhere; seeds of one rule are averaged first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_optimizer.lab.rows import parts_of
from fst_optimizer.stats import mean, mean_ci

Row = Mapping[str, Any]
Group = tuple[str, ...]
"""Values of the columns that tell groups apart."""


@dataclass(frozen=True)
class Section:
    """What the page shows of one experiment."""

    name: str
    """The file's, and the command's: `fst lab NAME`."""
    title: str
    text: str
    by: tuple[str, ...] = ("family", "kind", "method")
    """Columns that tell groups apart; those that the rows lack are left out."""
    values: tuple[str, ...] = ()
    """Columns that were measured; empty, or none of them there: all numbers."""
    along: str = ""
    """A column that the figure has for its x axis; the table has the last place of each run."""
    command: str = ""
    """How it is run, where it was not."""


SECTIONS = (
    Section(
        "decompose",
        "What the prompt learned, and what the weights learned",
        "Test scores of four programs a run: base or trained weights, under the seed instruction or the learned one. "
        "`interaction` is what both bring together beyond the sum of what each brings alone.",
        values=("base", "prompt", "weights", "both", "interaction"),
        command="fst lab decompose --runs runs/table --out runs/decompose",
    ),
    Section(
        "drift",
        "Drift",
        "How far the weights move from the base (KL, nats a token) and how well the model still does what it did: on "
        "the run's own validation set, on probes (single rules under the right instruction) and on other tasks.",
        by=("family", "role", "kind", "method"),
        values=("score", "kl"),
        along="rollouts",
        command="fst lab drift --runs runs/table --out runs/drift",
    ),
    Section(
        "plasticity",
        "Plasticity",
        "Fresh RL on a second task, from the base's weights and from those that FST and RL left. `area` is the mean "
        "height of the learning curve.",
        by=("family", "kind", "start"),
        values=("test_score_after", "val_score_after", "area", "kl_to_base"),
        command="fst lab plasticity --from RUN ... --to TASK --out runs/plasticity",
    ),
    Section(
        "stream",
        "A stream of tasks",
        "Four tasks in sequence in one uninterrupted run, from a seed prompt that names none of them.",
        command="fst lab stream TASK... --out runs/stream",
    ),
    Section(
        "ceiling",
        "Ceilings",
        "The paper's fit R - R0 = (A - R0) / (1 + (C_mid / C)^B) over training rollouts, where the curve bends: the "
        "ceiling A, its half-way rollouts C_mid, the slope B.",
        values=("A", "C_mid", "B"),
        command="fst lab ceiling runs/table --out runs/ceiling",
    ),
)
NOT_MEASURED = ("seed", "run", "cycle", "step", "policy_version", "examples")
"""Numbers that say which run or place a row is of."""


def columns(rows: Sequence[Row], section: Section) -> tuple[list[str], list[str]]:
    """Which columns of these rows tell groups apart, and which were measured."""
    by = [name for name in section.by if name in ("family", "kind") or any(name in row for row in rows)]
    numbers = [name for name in section.values if any(number_in(row.get(name)) is not None for row in rows)]
    if not numbers:
        names = dict.fromkeys(name for row in rows for name in row)
        skipped = (*NOT_MEASURED, *by, section.along)
        numbers = [
            name for name in names if name not in skipped and any(number_in(row.get(name)) is not None for row in rows)
        ]
    return by, numbers


def number_in(value: Any) -> float | None:
    """A plain number, or the mean of an interval; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def cell_of(row: Row, name: str) -> str:
    """A row's value in a column that tells groups apart; family and kind are read from its task."""
    family, _, kind = parts_of(str(row["task"]))
    return {"family": family, "kind": str(row.get("kind") or kind)}.get(name) or str(row.get(name, "-"))


def unit_of(row: Row) -> str:
    """What counts as one in the means: the rule."""
    return str(row.get("rule") or parts_of(str(row["task"]))[1])


def grouped(rows: Iterable[Row], by: Sequence[str]) -> dict[Group, list[Row]]:
    """Rows by their group, in order of appearance."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(cell_of(row, name) for name in by), []).append(row)
    return found


def last_places(rows: Sequence[Row], along: str) -> list[Row]:
    """Of each run the rows at its last place."""
    if not along or not any(along in row for row in rows):
        return list(rows)
    last: dict[tuple[str, ...], float] = {}
    for row in rows:
        last[_run_of(row)] = max(last.get(_run_of(row), row[along]), row[along])
    return [row for row in rows if row[along] == last[_run_of(row)]]


def _run_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("task", "run", "method", "rule", "seed"))


def by_unit(rows: Iterable[Row], name: str) -> dict[str, float]:
    """Unit -> the mean of a column over its rows that have a number there."""
    found: dict[str, list[float]] = {}
    for row in rows:
        number = number_in(row.get(name))
        if number is not None:
            found.setdefault(unit_of(row), []).append(number)
    return {unit: mean(numbers) for unit, numbers in found.items()}


def table(rows: Sequence[Row], section: Section) -> tuple[list[str], list[list[str]]]:
    """One row a group: means over units with 95% intervals."""
    by, values = columns(rows, section)
    found = []
    for group, own in grouped(last_places(rows, section.along), by).items():
        units = {name: by_unit(own, name) for name in values}
        count = max((len(one) for one in units.values()), default=0)
        found.append([*group, str(count), *(shown(mean_ci(one.values())) for one in units.values())])
    return [*by, "rules", *values], found


def shown(found: Mapping[str, Any] | None) -> str:
    """`0.512 ±0.032`, in as many digits as the number needs."""
    if found is None:
        return "-"
    digits = 0 if abs(found["mean"]) >= 100 else 3
    text = f"{found['mean']:.{digits}f}"
    return text if found["low"] is None else f"{text} ±{found['high'] - found['mean']:.{digits}f}"


def lines_along(rows: Sequence[Row], section: Section, name: str, by: Sequence[str]) -> dict[Group, list[list[float]]]:
    """Group -> places on the x axis with the mean over units that were measured there."""
    found = {}
    for group, own in grouped(rows, by).items():
        places = sorted({float(row[section.along]) for row in own if number_in(row.get(section.along)) is not None})
        points = []
        for place in places:
            values = by_unit([row for row in own if row.get(section.along) == place], name).values()
            if values:
                points.append([place, mean(list(values))])
        if points:
            found[group] = points
    return found
