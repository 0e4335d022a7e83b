"""`fst lab sweep`: each method's learning rate, chosen on other seeds than those of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.curves import settled_best
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.stats import mean, standard_error
from fst_optimizer.store.files import RunFiles, read_json, write_json

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
) -> list[tuple[float, Job]]:
    """Every method x learning rate x seed."""
    return [
        (
            rate,
            Job(
                task,
                method,
                seed,
                folder / f"{method}-lr{rate:g}-seed{seed}",
                common,
                (*own_sets.get(method, ()), f"train.lr={rate!r}"),
            ),
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
    for method, rates in by_rate(runs).items():
        final = {rate: mean([one["val_score_after"] for one in own]) for rate, own in rates.items()}
        cost = {rate: mean([one["settled_rollouts"] for one in own]) for rate, own in rates.items()}
        best = max(final.values())
        floor = best - standard_error(best, min(run["val_examples"] for run in runs))
        picked[method] = min((rate for rate in final if final[rate] >= floor), key=lambda rate: (cost[rate], rate))
    return picked


def by_rate(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[Mapping[str, Any]]]]:
    """Method -> rate -> its runs, over tasks and seeds."""
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["lr"], []).append(run)
    return found


def save_sweep(jobs: Sequence[tuple[float, Job]], out: Path, *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `sweep.json` from the finished runs and return what is in it."""
    runs = []
    for rate, job in jobs:
        result = read_json(RunFiles(job.folder).result)
        kept = ("val_score_before", "val_score_after", "kl_to_base", "rollouts", "wall_s")
        about = {"task": job.task, "method": job.method, "lr": rate, "seed": job.seed}
        read = read_run(job.folder)
        settled = {"settled_rollouts": settled_best(read.curve, read.val_examples).rollouts}
        numbers = {name: result[name] for name in kept} | settled | {"val_examples": read.val_examples}
        runs.append({**about, "dir": job.folder.relative_to(out).as_posix(), **numbers})
    means = {
        method: [
            {"lr": rate, **{name: mean([one[name] for one in own]) for name in ("val_score_after", "settled_rollouts")}}
            for rate, own in sorted(rates.items())
        ]
        for method, rates in by_rate(runs).items()
    }
    data = {**extra, "picked": pick_rates(runs), "means": means, "runs": runs}
    write_json(out / "sweep.json", data)
    return data


def picked_sets(path: Path, methods: Sequence[str]) -> dict[str, list[str]]:
    """Method -> `train.lr=...`, as the sweep picked.

    Raises:
        UserError: the sweep knows nothing of a method that trains.
    """
    picked = read_json(path).get("picked", {})
    lacking = [method for method in methods if method not in picked and method != WITHOUT_RATE]
    if lacking:
        raise UserError(f"{path} has no learning rate for {', '.join(lacking)}: sweep these methods too")
    return {method: [f"train.lr={picked[method]!r}"] for method in methods if method in picked}
