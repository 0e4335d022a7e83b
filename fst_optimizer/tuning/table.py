"""The live table of a study on a terminal, and one line a trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fst_optimizer.lab.tables import rich_table
from fst_optimizer.text import clock
from fst_optimizer.tuning.rows import HEAD, cells, left_s, progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Rows = Sequence[Mapping[str, Any]]
SHOWN = 24
"""Rows of the live table: the last ones, and those that run."""


class Lines:
    """One line for each trial that begins or ends.

    Args:
        console: Where to.
        trials: N.
        cap: Training rollouts of one trial.
    """

    def __init__(self, console: Console, trials: int, cap: int) -> None:
        self.console = console
        self.trials = trials
        self.cap = cap
        self.states: dict[int, str] = {}
        self.before: float | None = None
        self.started_s = time.monotonic()
        self.rows: Rows = ()

    def update(self, rows: Rows) -> None:
        """Takes the trials as they are now. What had ended when this began is not told again."""
        first = self.before is None
        if self.before is None:
            self.before = progress(rows, self.cap)
        for row in rows:
            if self.states.get(row["trial"]) != row["state"] and row["state"] != "waiting":
                self.states[row["trial"]] = row["state"]
                if not first or row["state"] == "running":
                    self._tell(row)
        self.rows = rows

    def left(self) -> str:
        """The time left, as people read it."""
        now, elapsed_s = progress(self.rows, self.cap), time.monotonic() - self.started_s
        seconds = left_s(self.before or 0.0, now, self.trials, elapsed_s)
        return "-" if seconds is None else clock(seconds)

    def _tell(self, row: Mapping[str, Any]) -> None:
        number, state, params, score, rollouts, why = cells(row)
        text = (
            f"trial {number} {state}: {params}"
            if state == "running"
            else (f"trial {number} {state}: score {score}, {rollouts} rollouts{f' ({why})' if why else ''}")
        )
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Table(Lines):
    """The same trials as a table that rich draws again and again."""

    def _tell(self, row: Mapping[str, Any]) -> None:
        return

    def __rich__(self) -> RenderableType:
        """The table; rich asks for it a few times a second."""
        from rich.console import Group
        from rich.text import Text

        running = [row for row in self.rows if row["state"] == "running"]
        ended = [row for row in self.rows if row["state"] not in ("running", "waiting")]
        shown = sorted([*ended[-max(1, SHOWN - len(running)) :], *running], key=lambda row: row["trial"])
        done = sum(row["state"] in ("complete", "pruned") for row in self.rows)
        spent = sum(row["rollouts"] for row in self.rows)
        elapsed = clock(time.monotonic() - self.started_s)
        foot = f"{done} of {self.trials} trials   {spent} rollouts   elapsed {elapsed}   left {self.left()}"
        return Group(rich_table("", HEAD, [cells(row) for row in shown]), Text(foot))


@contextmanager
def showing(console: Console, trials: int, cap: int) -> Iterator[Lines]:
    """The display that fits the console, while the context is open."""
    if not console.is_terminal:
        yield Lines(console, trials, cap)
        return
    from rich.live import Live

    table = Table(console, trials, cap)
    with Live(table, console=console, refresh_per_second=2, transient=True):
        yield table
