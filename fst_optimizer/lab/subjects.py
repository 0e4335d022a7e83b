"""The finished runs that an experiment measures: found, or made as `fst lab compare` makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_optimizer.config.run import METHODS
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import FinishedRun, read_finished
from fst_optimizer.finished.recorded import recorded_task
from fst_optimizer.lab.cells import Entry
from fst_optimizer.lab.compare import ComparedRun, read_entry, read_run
from fst_optimizer.lab.methods import plain
from fst_optimizer.lab.rows import parts_of
from fst_optimizer.store.files import RunFiles
from fst_optimizer.tasks import Task, load_task


@dataclass(frozen=True)
class Subject:
    """A finished run with its task."""

    task: Task
    run: ComparedRun
    finished: FinishedRun

    @property
    def label(self) -> str:
        """`VARIANT/METHOD-seedN`, or whatever its folders are called."""
        return f"{self.run.folder.parent.name}/{self.run.folder.name}"

    @property
    def row(self) -> dict[str, Any]:
        """What every row of an experiment says of the run that it is about."""
        return {**told_of(self.task.name, self.run.method, self.run.seed), "run": self.label}


def told_of(task: str, method: str, seed: int) -> dict[str, Any]:
    """What the rows of all experiments begin with."""
    family, rule, kind = parts_of(task)
    return {"task": task, "method": method, "family": family, "rule": rule, "kind": kind, "seed": seed}


def subjects_of(entries: Iterable[Entry]) -> list[Subject]:
    """The finished runs of a comparison's entries, each once: kinds share those of methods that read no feedback.

    Of a sweep it is the best run, under the sweep's name.
    """
    found = {}
    for entry in entries:
        run = read_entry(entry)
        if run is not None and run.folder not in found:
            task = next(job.task for job in entry.jobs if job.folder == run.folder)
            found[run.folder] = Subject(load_task(task), run, read_finished(run.folder))
    return list(found.values())


def subject_of(folder: Path, task: str | None = None) -> Subject:
    """A finished run; `task` builds its program. None: the run's own, where that comes with the package.

    Raises:
        UserError: it is not finished, its files were changed, or its task must be said.
    """
    finished = read_finished(folder)
    own = recorded_task(finished.config, str(folder)) if task is None else load_task(task)
    return Subject(own, read_run(folder), finished)


def finished_runs(folders: Iterable[Path], methods: Sequence[str] | None = None) -> list[Path]:
    """Run directories that are finished, at these places or up to three folders below.

    Of these methods; None: of all that `fst compile` has, as others leave no policy versions.

    Raises:
        UserError: a place has none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        here = [path.parent for path in _results(folder)]
        made_by = {path: read_run(path).method for path in here}
        mine = [path for path, one in made_by.items() if (plain(one) in METHODS if methods is None else one in methods)]
        if not mine:
            of = f" of {', '.join(methods)}" if methods and here else ""
            raise UserError(
                f"--runs {str(folder)!r} has no finished run{of}: give run directories, or a folder that fst lab "
                "compare --out has filled"
            )
        found |= dict.fromkeys(mine)
    return list(found)


def _results(folder: Path) -> Iterator[Path]:
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        yield from (
            path for path in sorted(folder.glob(f"{depth}result.json")) if RunFiles(path.parent).config.exists()
        )


def by_run(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the run that they are about: (task, method, seed, run)."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["method"], row["seed"], row["run"]), []).append(row)
    return found
