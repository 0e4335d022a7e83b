"""`fst lab sweep`: each method's learning rate, chosen on other seeds than those of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.run.files import RunFiles, read_json, write_json

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
    """Method -> the rate with the best mean final validation score; the smaller of two that tie."""
    means = mean_scores(runs)
    return {method: min(rates, key=lambda rate: (-rates[rate], rate)) for method, rates in means.items()}


def mean_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Method -> rate -> mean of `val_score_after` over tasks and seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["lr"], []).append(run["val_score_after"])
    return {
        method: {rate: sum(scores) / len(scores) for rate, scores in rates.items()} for method, rates in found.items()
    }


def save_sweep(jobs: Sequence[tuple[float, Job]], out: Path, *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `sweep.json` from the finished runs and return what is in it."""
    runs = []
    for rate, job in jobs:
        result = read_json(RunFiles(job.folder).result)
        kept = ("val_score_before", "val_score_after", "kl_to_base", "rollouts", "wall_s")
        about = {"task": job.task, "method": job.method, "lr": rate, "seed": job.seed}
        runs.append({**about, "dir": job.folder.relative_to(out).as_posix(), **{name: result[name] for name in kept}})
    means = {
        method: [{"lr": rate, "val_score_after": score} for rate, score in sorted(rates.items())]
        for method, rates in mean_scores(runs).items()
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
