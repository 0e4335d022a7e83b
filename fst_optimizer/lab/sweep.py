"""`fst lab sweep`: each method's learning rate, chosen on other seeds than those of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.curves import settled_best
from fst_optimizer.lab.methods import built_in, is_sweep, swept
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.stats import mean, standard_error
from fst_optimizer.store.files import read_json, write_json

WITHOUT_RATE = "gepa"
"""Never trains, so its learning rate decides nothing."""


def sweep_jobs(
    task: str,
    folder: Path,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    common: Common,
    own_sets: Mapping[str, Sequence[str]],
) -> list[Job]:
    """Every method x learning rate x seed.

    Raises:
        UserError: a method is a sweep itself.
    """
    if sweeps := [method for method in methods if is_sweep(method)]:
        raise UserError(f"--methods has {sweeps[0]!r}, which is a sweep itself: leave it out")
    return [
        Job(
            task,
            method,
            seed,
            folder / f"{method}-lr{rate:g}-seed{seed}",
            common,
            (*built_in(method), *own_sets.get(method, ()), f"train.lr={rate!r}"),
        )
        for seed in seeds
        for method in methods
        if method != WITHOUT_RATE
        for rate in rates
    ]


def pick_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Method -> the rate that gets there first, of those within one standard error of the best final score.

    A final score alone would choose by noise among rates that end level, and may take the slowest.
    """
    picked = {}
    for method, rates in _means(runs).items():
        best = max(one["val_score_after"] for one in rates)
        floor = best - standard_error(best, min(run["val_examples"] for run in runs))
        level = [one for one in rates if one["val_score_after"] >= floor]
        picked[method] = min(level, key=lambda one: (one["settled_rollouts"], one["lr"]))["lr"]
    return picked


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Method -> its rates in order, each with means over tasks and seeds."""
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["lr"], []).append(run)
    names = ("val_score_after", "settled_rollouts")
    return {
        method: [
            {"lr": rate, **{name: mean([run[name] for run in own]) for name in names}}
            for rate, own in sorted(rates.items())
        ]
        for method, rates in found.items()
    }


def save_sweep(jobs: Sequence[Job], out: Path, *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `sweep.json` from the finished runs and return what is in it."""
    runs = []
    for job in jobs:
        run = read_run(job.folder)
        copied = ("val_score_before", "val_score_after", "kl_to_base", "rollouts", "wall_s")
        runs.append(
            {
                "task": job.task,
                "method": job.method,
                "lr": run.recorded["config"]["train"]["lr"],
                "seed": job.seed,
                "dir": job.folder.relative_to(out).as_posix(),
                **{name: run.result[name] for name in copied},
                "settled_rollouts": settled_best(run.curve, run.val_examples).rollouts,
                "val_examples": run.val_examples,
            }
        )
    data = {**extra, "picked": pick_rates(runs), "means": _means(runs), "runs": runs}
    write_json(out / "sweep.json", data)
    return data


def picked_sets(path: Path, methods: Sequence[str]) -> dict[str, list[str]]:
    """Method -> `train.lr=...`, as the sweep picked; for METHOD+LABEL that was not swept the method's own.

    Raises:
        UserError: the sweep has no rate for a method that trains.
    """
    found = read_json(path).get("picked", {})
    picked = {method: found.get(method, found.get(swept(method))) for method in methods}
    lacking = [method for method, rate in picked.items() if rate is None and method != WITHOUT_RATE]
    if lacking:
        raise UserError(f"{path} has no learning rate for {', '.join(lacking)}: sweep these methods too")
    return {method: [f"train.lr={rate!r}"] for method, rate in picked.items() if rate is not None}
