"""Who is better than whom, by rule: what the results page says of the rows of its comparisons. Pure functions.

The unit is the rule: seeds of one rule are averaged first. Where a family has a single rule, seeds are the units, and
what is found holds for that rule alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_optimizer.lab.curves import Point, first_reaching, settled_best
from fst_optimizer.stats import mean, median_ci, paired_difference, verdict_less, verdict_more
from fst_optimizer.task_kit import KINDS

Row = Mapping[str, Any]

SUBJECT, REFERENCE = "fst", "rl"
MOST_ROLLOUTS = 1 / 3
"""The aim: FST's share of the rollouts that RL takes to its best."""


@dataclass(frozen=True)
class Cell:
    """One family under one kind of feedback, all methods at the same cap."""

    family: str
    kind: str
    cap: int | None
    unit: str
    """`rule`, or `seed` where there is one rule."""
    runs: Mapping[str, Mapping[str, Sequence[Row]]]
    """Method -> unit -> its rows."""

    @property
    def units(self) -> list[str]:
        """All that any method has, sorted."""
        return sorted({unit for of_method in self.runs.values() for unit in of_method}, key=natural)

    def rows(self, method: str) -> list[Row]:
        """All of a method's."""
        return [row for rows in self.runs[method].values() for row in rows]


@dataclass(frozen=True)
class Verdict:
    """What came of one question about FST."""

    cell: Cell
    against: str
    """A method; of a share of rollouts, always RL."""
    share: bool
    """False: the difference of final scores. True: the share of RL's rollouts to its best."""
    found: Mapping[str, Any] | None
    """As `paired_difference` or `median_ci` gives it."""
    outcome: str
    """`won`, `lost` or `undecided`."""


def cells_of(rows: Iterable[Row]) -> tuple[list[Cell], list[Row]]:
    """The cells of a comparison, and the rows that belong to none since their cap is another one.

    A method that reads no feedback was run once a rule, and stands in the cell of every kind. The cap of a family is
    the one that most of its rows have.
    """
    rows, cells, further = list(distinct(rows)), [], []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        cap = Counter(row["cap"] for row in own).most_common(1)[0][0]
        further += [row for row in own if row["cap"] != cap]
        same = [row for row in own if row["cap"] == cap]
        unit = "rule" if len({row["rule"] for row in same}) > 1 else "seed"
        kinds = {row["kind"] for row in same if row["reads_feedback"]} or {row["kind"] for row in same}
        methods = sorted(dict.fromkeys(row["method"] for row in same), key=lambda name: name != SUBJECT)
        for kind in sorted(kinds, key=kind_order):
            runs: dict[str, dict[str, list[Row]]] = {}
            for row in same:
                if row["kind"] == kind or not row["reads_feedback"]:
                    runs.setdefault(row["method"], {}).setdefault(str(row[unit]), []).append(row)
            ordered = {method: runs[method] for method in methods if method in runs}
            cells.append(Cell(family, kind, cap, unit, ordered))
    return cells, further


def distinct(rows: Iterable[Row]) -> Iterable[Row]:
    """Every run once: the comparisons of all kinds hold the same run of a method that reads no feedback."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        kind = row["kind"] if row["reads_feedback"] else None
        found.setdefault((row["family"], row["rule"], kind, row["method"], row["seed"], row["cap"]), row)
    return found.values()


def score_of(row: Row) -> float:
    """The final score: on the test set where there is one."""
    tested = row["test_score_after"]
    return float(row["val_score_after"] if tested is None else tested)


def scores(cell: Cell, method: str) -> dict[str, float]:
    """Unit -> the method's final score, the mean of its seeds."""
    return {unit: mean([score_of(row) for row in rows]) for unit, rows in cell.runs[method].items()}


def end_curve(row: Row) -> list[Point]:
    """The validation curve at the ends of cycles, where all methods are evaluated."""
    return [Point(rollouts, score, kl) for rollouts, score, kl, is_end in row["curve"] if is_end]


def reaching(row: Row, reference: Row) -> tuple[float, bool] | None:
    """Rollouts to RL's best over RL's, and whether it was reached; where it was not, the cap over RL's: at least that.

    None: RL's best is its start, and there is nothing to reach.
    """
    best = settled_best(end_curve(reference), reference["val_examples"])
    if not best.rollouts:
        return None
    curve = end_curve(row)
    there = first_reaching(curve, best.score)
    if there is not None:
        return there.rollouts / best.rollouts, True
    return max(row["cap"] or 0, curve[-1].rollouts) / best.rollouts, False


def shares(cell: Cell, method: str) -> dict[str, tuple[float, bool]]:
    """Unit -> `reaching`, over the seeds that RL has as well; of several seeds the median."""
    found = {}
    for unit, rows in cell.runs[method].items():
        references = {row["seed"]: row for row in cell.runs.get(REFERENCE, {}).get(unit, ())}
        pairs = [one for row in rows if row["seed"] in references and (one := reaching(row, references[row["seed"]]))]
        middle = median_ci([value for value, there in pairs if there], [value for value, there in pairs if not there])
        if middle is not None:
            found[unit] = (middle["median"], not middle["median_at_least"])
    return found


def evaluated_on_the_way(cell: Cell, method: str) -> bool:
    """Whether a method's runs were evaluated between start and end, so that they can be seen to get somewhere."""
    return any(len(end_curve(row)) > 2 for row in cell.rows(method))


def share_ci(cell: Cell, method: str) -> dict[str, Any] | None:
    """The median over units of the share of RL's rollouts; units that never got there count from their cap on."""
    found = shares(cell, method).values()
    return median_ci([value for value, there in found if there], [value for value, there in found if not there])


def verdicts_of(cell: Cell) -> list[Verdict]:
    """FST against every other method by final score, and its share of RL's rollouts."""
    if SUBJECT not in cell.runs:
        return []
    ours, found = scores(cell, SUBJECT), []
    for method in cell.runs:
        if method != SUBJECT:
            difference = paired_difference(ours, scores(cell, method))
            found.append(Verdict(cell, method, False, difference, verdict_more(difference)))
    if REFERENCE in cell.runs:
        share = share_ci(cell, SUBJECT)
        found.append(Verdict(cell, REFERENCE, True, share, verdict_less(share, MOST_ROLLOUTS)))
    return found


def kind_order(kind: str) -> tuple[int, str]:
    """Kinds in their own order, others behind."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def natural(name: str) -> tuple[int, str]:
    """Seeds by number, rules by name."""
    return (int(name), "") if name.isdigit() else (-1, name)
