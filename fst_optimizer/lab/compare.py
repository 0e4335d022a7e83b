"""`fst lab compare`: methods x seeds at the same cap of training rollouts, and the numbers that come of it.

Every number in `compare.json` is read from the runs' own files, so that it can be made again from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.lab.curves import (
    Point,
    against,
    at_cycle_ends,
    ceiling,
    curve_of,
    settled_best,
    signal_left,
)
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.stats import mean_ci
from fst_optimizer.store.files import RunFiles, read_json, write_json
from fst_optimizer.store.metrics import read_metrics

REFERENCE = "rl"
FINAL = ("val_score_before", "val_score_after", "test_score_before", "test_score_after", "kl_to_base", "wall_s")


@dataclass(frozen=True)
class RunRead:
    """A finished run, read back."""

    method: str
    """As the comparison was asked for it: METHOD, METHOD@ENGINE, METHOD+LABEL."""
    seed: int
    folder: Path
    curve: tuple[Point, ...]
    result: Mapping[str, Any]
    recorded: Mapping[str, Any]
    signal: Mapping[str, float] | None = None
    """See `signal_left`."""
    end_curve: tuple[Point, ...] = ()
    """The curve at the ends of cycles alone, as often as RL is looked at."""

    @property
    def val_examples(self) -> int:
        """How many validation examples a score is the mean of."""
        limit = self.recorded["config"]["eval"]["max_examples"]
        count: int = self.recorded["data"]["val"]["examples"]
        return count if limit is None else min(limit, count)


def comparison_jobs(
    task: str,
    folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    common: Common,
    own_sets: Mapping[str, Sequence[str]],
) -> list[Job]:
    """Seeds outermost, so that a comparison that is stopped early has whole seeds."""
    return [
        Job(task, method, seed, folder / f"{method}-seed{seed}", common, tuple(own_sets.get(method, ())))
        for seed in seeds
        for method in methods
    ]


def read_run(folder: Path) -> RunRead:
    """One finished run's numbers."""
    files = RunFiles(folder)
    result = read_json(files.result)
    lines = read_metrics(files.metrics)
    curve, signal = tuple(curve_of(lines)), signal_left(lines)
    ends = tuple(curve_of(at_cycle_ends(lines)))
    recorded = read_config(files.config)
    label = folder.name.rpartition(f"-seed{result['seed']}")[0] or result["method"]
    return RunRead(label, result["seed"], folder, curve, result, recorded, signal, ends)


def compared(runs: Sequence[RunRead], *, root: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `compare.json` for one task.

    Args:
        runs: All runs of the task.
        root: The comparison's folder; paths are written relative to it.
        extra: What else to write down: command, cap, learning rates.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    first = runs[0]
    examples = first.val_examples
    of = {method: [run for run in runs if run.method == method] for method in methods}
    curves = {method: {run.seed: run.curve for run in of[method]} for method in methods}
    ends = {method: {run.seed: run.end_curve for run in of[method]} for method in methods}
    return {
        "task": first.result["task"],
        **extra,
        "val_examples": examples,
        "test_examples": (first.recorded["data"].get("test") or {}).get("examples"),
        "model": shown_model(first.recorded["policy"]["model"]),
        "versions": first.recorded["versions"],
        "settings": {method: of[method][0].recorded["config"] for method in methods},
        "runs": [_run_json(run, root) for run in runs],
        "methods": {method: _method_json(of[method]) for method in methods},
        "differences": {f"{a} - {b}": _difference(of[a], of[b]) for a, b in combinations(methods, 2)},
        "rl_best": _best_json(curves[REFERENCE], examples) if REFERENCE in of else None,
        "against_rl": {
            method: against(curves[method], curves[REFERENCE], examples)
            for method in methods
            if REFERENCE in of and method != REFERENCE
        },
        "against_rl_at_cycle_ends": {
            method: against(ends[method], curves[REFERENCE], examples)
            for method in methods
            if REFERENCE in of and method != REFERENCE
        },
    }


def save_comparison(runs: Sequence[RunRead], folder: Path, *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `compare.json` into the task's folder and return what is in it."""
    data = compared(runs, root=folder, extra=extra)
    write_json(folder / "compare.json", data)
    return data


def shown_model(model: str) -> str:
    """A model's name without the path of the machine that it lay on."""
    return "/".join(Path(model).parts[-2:])


def _run_json(run: RunRead, root: Path) -> dict[str, Any]:
    kept = ("rollouts", "steps", "cycles", "reflection_calls", "cost_usd", "policy_version", "candidate", "ended")
    return {
        "method": run.method,
        "seed": run.seed,
        "dir": run.folder.relative_to(root).as_posix(),
        "curve": [[point.rollouts, point.score, point.kl] for point in run.curve],
        **{name: run.result[name] for name in (*FINAL, *kept)},
        "ceiling": ceiling(run.curve),
        "signal": run.signal,
    }


def _method_json(runs: Sequence[RunRead]) -> dict[str, Any]:
    """Means with intervals over the seeds."""
    training = [run.result["rollouts"]["fast"] + run.result["rollouts"]["slow"] for run in runs]
    signals = [run.signal for run in runs if run.signal]
    ceilings = [found["A"] for run in runs if (found := ceiling(run.curve))]
    return {
        "seeds": [run.seed for run in runs],
        **{name: mean_ci(run.result[name] for run in runs) for name in FINAL},
        "training_rollouts": mean_ci(training),
        "ceiling": mean_ci(ceilings),
        "signal": {name: mean_ci(one[name] for one in signals) for name in signals[0]} if signals else None,
    }


def _difference(ours: Sequence[RunRead], theirs: Sequence[RunRead]) -> dict[str, Any]:
    """Final scores of one method over another's, paired by seed."""
    other = {run.seed: run.result for run in theirs}
    pairs = [(run.result, other[run.seed]) for run in ours if run.seed in other]
    return {
        name: mean_ci(a[name] - b[name] for a, b in pairs if a[name] is not None and b[name] is not None)
        for name in ("val_score_after", "test_score_after")
    }


def _best_json(curves: Mapping[int, Sequence[Point]], examples: int) -> list[dict[str, Any]]:
    return [{"seed": seed, **asdict(settled_best(curve, examples))} for seed, curve in sorted(curves.items())]
