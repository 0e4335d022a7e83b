"""What an experiment leaves: its rows as JSON, and a figure made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.lab.experiment_figures import FIGURES, save
from fst_optimizer.run.record import versions
from fst_optimizer.store.files import write_json


def write_outcome(name: str, rows: Sequence[Mapping[str, Any]], out: Path, command: str) -> list[Path]:
    """`NAME.json` (`{command, versions, rows}`) and `NAME.png` in `out`."""
    path = out / f"{name}.json"
    write_json(path, {"command": command, "versions": versions(), "rows": list(rows)})
    return [path, save(FIGURES[name](rows), out / f"{name}.png")]
