"""`fst lab compare`: methods x seeds at the same cap of training rollouts, and the numbers that come of it.

Every number in `compare.json` is read from the runs' own files, so that it can be made again from them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.run import METHODS
from fst_optimizer.lab.ceiling import ceiling
from fst_optimizer.lab.cells import Entry
from fst_optimizer.lab.curves import (
    Point,
    against,
    at_cycle_ends,
    curve_of,
    search_of,
    settled_best,
    signal_left,
)
from fst_optimizer.lab.facts import seconds_by_phase, told
from fst_optimizer.lab.plan import Job
from fst_optimizer.lab.rows import run_row
from fst_optimizer.stats import mean_ci
from fst_optimizer.store.files import RunFiles, read_json, write_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.task_run import Sizes

REFERENCE = "rl"
FINAL = ("val_score_before", "val_score_after", "test_score_before", "test_score_after", "kl_to_base", "wall_s")
COPIED = ("rollouts", "steps", "cycles", "reflection_calls", "cost_usd", "policy_version", "candidate", "ended")
"""What of a run's `result.json` is in `compare.json` beside the final numbers."""


@dataclass(frozen=True)
class ComparedRun:
    """A finished run, read back."""

    method: str
    """As the comparison was asked for it: METHOD, METHOD@ENGINE, METHOD+LABEL."""
    seed: int
    folder: Path
    result: Mapping[str, Any]
    """Its `result.json`."""
    recorded: Mapping[str, Any]
    """Its `config.json`."""
    curve: tuple[Point, ...]
    end_curve: tuple[Point, ...]
    """The curve at the ends of cycles alone: as often as RL is evaluated."""
    signal: Mapping[str, float] | None
    """See `signal_left`."""
    search: Mapping[str, Any]
    """See `search_of`."""
    seconds: Mapping[str, float] | None
    """See `seconds_by_phase`. None for a baseline, which writes no lines of its phases."""
    sweep: tuple[tuple[Job, ComparedRun | None], ...] = ()
    """Of a sweep: all of its runs, None for one without a result. This is the best of them."""

    @property
    def val_examples(self) -> int:
        """How many validation examples a score is the mean of."""
        limit = self.recorded["config"]["eval"]["max_examples"]
        count: int = self.recorded["data"]["val"]["examples"]
        return count if limit is None else min(limit, count)


def read_entry(entry: Entry) -> ComparedRun | None:
    """What a method came to with one seed; of a sweep the best run by validation. None: nothing is finished."""
    runs = [read_run(job.folder) if RunFiles(job.folder).result.exists() else None for job in entry.jobs]
    finished = [run for run in runs if run is not None]
    if len(entry.jobs) == 1 or not finished:
        return finished[0] if finished else None
    best = max(finished, key=lambda run: run.result["val_score_after"])  # of equals the first of the grid
    return replace(best, method=entry.method, sweep=tuple(zip(entry.jobs, runs, strict=True)))


def read_run(folder: Path) -> ComparedRun:
    """One finished run's numbers."""
    files = RunFiles(folder)
    result, lines = read_json(files.result), read_metrics(files.metrics)
    return ComparedRun(
        method=folder.name.rpartition(f"-seed{result['seed']}")[0] or result["method"],
        seed=result["seed"],
        folder=folder,
        result=result,
        recorded=read_config(files.config),
        curve=tuple(curve_of(lines)),
        end_curve=tuple(curve_of(at_cycle_ends(lines))),
        signal=signal_left(lines),
        search=search_of(lines),
        seconds=seconds_by_phase(lines, result["wall_s"]) if result["method"] in METHODS else None,
    )


def save_comparison(runs: Sequence[ComparedRun], folder: Path, *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `compare.json` into a task's folder and return what is in it.

    The runs are all of the task's; paths are relative to the folder, `../RULE/...` for those that several kinds of
    feedback share. `extra` is written down as well, over what is read from the runs: command, cap, learning rates.
    """
    first, examples = runs[0], runs[0].val_examples
    by_method = {method: [run for run in runs if run.method == method] for method in (run.method for run in runs)}
    reference = {run.seed: run.curve for run in by_method.get(REFERENCE, ())}
    # A method without rollouts of its own to learn from, as sft, reaches nothing sooner or later.
    others = {
        method: some
        for method, some in by_method.items()
        if reference and method != REFERENCE and all(map(_trained_on_rollouts, some))
    }
    data = {
        "task": first.result["task"],
        **extra,
        "val_examples": examples,
        "test_examples": Sizes().over(first.recorded).test,
        "model": shown_model(first.recorded["policy"]["model"]),
        "versions": first.recorded["versions"],
        "settings": {method: some[0].recorded["config"] for method, some in by_method.items()},
        "runs": [_run_json(run, folder) for run in runs],
        "rows": [run_row(run) for run in runs],
        "methods": {method: _method_json(some) for method, some in by_method.items()},
        "differences": {f"{a} - {b}": _difference(by_method[a], by_method[b]) for a, b in combinations(by_method, 2)},
        "rl_best": [
            {"seed": seed, **asdict(settled_best(curve, examples))} for seed, curve in sorted(reference.items())
        ]
        or None,
        "against_rl": {
            method: against({run.seed: run.curve for run in some}, reference, examples)
            for method, some in others.items()
        },
        "against_rl_at_cycle_ends": {
            method: against({run.seed: run.end_curve for run in some}, reference, examples)
            for method, some in others.items()
        },
    }
    write_json(folder / "compare.json", data)
    return data


def shown_model(model: str) -> str:
    """A model's name without the path of the machine that it lay on."""
    return "/".join(Path(model).parts[-2:])


def _trained_on_rollouts(run: ComparedRun) -> bool:
    return bool(run.result["rollouts"]["fast"] + run.result["rollouts"]["slow"])


def _run_json(run: ComparedRun, root: Path) -> dict[str, Any]:
    return {
        "method": run.method,
        "seed": run.seed,
        "dir": _below(run.folder, root),
        "curve": [[point.rollouts, point.score, point.kl] for point in run.curve],
        **{name: run.result[name] for name in (*FINAL, *COPIED)},
        "ceiling": ceiling(run.curve),
        "signal": run.signal,
        "told": told(run.method, run.recorded),
        "search": run.search,
        "seconds": run.seconds,
        "supervised": run.result.get("supervised"),
        "sweep": [_point_json(job, one, run, root) for job, one in run.sweep] or None,
    }


def _point_json(job: Job, run: ComparedRun | None, best: ComparedRun, root: Path) -> dict[str, Any]:
    """One run of a sweep; its numbers are None where it has no result."""
    read = ("val_score_after", "test_score_after", "rollouts", "wall_s")
    return {
        "method": job.method,
        "sets": list(job.sets),
        "dir": _below(job.folder, root),
        "picked": job.folder == best.folder,
        **{name: run and run.result[name] for name in read},
    }


def _below(folder: Path, root: Path) -> str:
    return Path(os.path.relpath(folder, root)).as_posix()


def _method_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Means with intervals over the seeds."""
    signals = [run.signal for run in runs if run.signal]
    ceilings = [fit["A"] for run in runs if (fit := ceiling(run.curve))]
    return {
        "seeds": [run.seed for run in runs],
        **{name: mean_ci(run.result[name] for run in runs) for name in FINAL},
        "training_rollouts": mean_ci(run.result["rollouts"]["fast"] + run.result["rollouts"]["slow"] for run in runs),
        "ceiling": mean_ci(ceilings),
        "signal": {name: mean_ci(one[name] for one in signals) for name in signals[0]} if signals else None,
    }


def _difference(ours: Sequence[ComparedRun], theirs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Final scores of one method over another's, paired by seed."""
    other = {run.seed: run.result for run in theirs}
    pairs = [(run.result, other[run.seed]) for run in ours if run.seed in other]
    return {
        name: mean_ci(a[name] - b[name] for a, b in pairs if a[name] is not None and b[name] is not None)
        for name in ("val_score_after", "test_score_after")
    }
