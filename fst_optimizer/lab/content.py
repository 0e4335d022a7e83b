"""What the results page is made of: the kept JSON of comparisons and experiments, and people's remarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_optimizer.lab.rows import REMARKS, find_kept
from fst_optimizer.lab.verdicts import Cell, Row, cells_of


@dataclass(frozen=True)
class Content:
    """What the page is made of."""

    kept: Mapping[str, Mapping[str, Any]]
    cells: Sequence[Cell]
    further: Sequence[Row]
    """Runs at another cap."""
    experiments: Mapping[str, Mapping[str, Any]]
    remarks: str = ""

    @property
    def families(self) -> dict[str, list[Cell]]:
        """Family -> its cells."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.family, []).append(cell)
        return found


def content_of(folders: Sequence[Path]) -> Content:
    """What lies in these folders, as `find_kept` finds it.

    Raises:
        UserError: see `find_kept`.
    """
    kept = find_kept(folders)
    compared = {name: data for name, data in kept.items() if is_comparison(data)}
    cells, further = cells_of(row for data in compared.values() for row in data["rows"])
    remarks = [path.read_text(encoding="utf-8").strip() for folder in folders if (path := folder / REMARKS).exists()]
    others = {name: data for name, data in kept.items() if name not in compared}
    return Content(kept, cells, further, others, "\n\n".join(remarks))


def is_comparison(data: Mapping[str, Any]) -> bool:
    """Whether a file's rows are runs of a comparison; the others are an experiment's."""
    return bool(data["rows"]) and "cap" in data["rows"][0]
