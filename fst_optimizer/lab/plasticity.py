"""`fst lab plasticity`: fresh RL on a second task, from the base's weights and from those that runs left.

All runs share everything but the weights that they begin with: the second task, its own instructions, the settings, the
seeds and the cap of rollouts. Source: arXiv 2605.12484.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import FinishedRun, origin_of, read_finished
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.curves import Curve, Point
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.lab.rows import parts_of
from fst_optimizer.lab.subjects import told_of
from fst_optimizer.stats import mean
from fst_optimizer.store.files import RunFiles

BASE = "base"
METHOD = "rl"


@dataclass(frozen=True)
class Start:
    """The weights that runs on the second task begin with."""

    name: str
    """`base`, or RULE-METHOD-seedN of the run that left them."""
    folder: Path | None = None
    run: FinishedRun | None = None

    @property
    def row(self) -> dict[str, Any]:
        """What a row says of them. `start` is the method that made them."""
        if self.run is None:
            return {"start": BASE, "start_name": self.name}
        result = self.run.result
        _, rule, kind = parts_of(result["task"])
        told = {"start_task": result["task"], "start_rule": rule, "start_kind": kind, "start_seed": result["seed"]}
        names = {"start_version": "policy_version", "start_kl": "kl_to_base", "start_test_score": "test_score_after"}
        reached = {name: result[one] for name, one in names.items()}
        return {"start": self._method, "start_name": self.name, **told, **reached}

    @property
    def _method(self) -> str:
        """As the folder has it, with its label, else the run's own."""
        assert self.folder is not None and self.run is not None
        return self.folder.name.rpartition(f"-seed{self.run.result['seed']}")[0] or str(self.run.result["method"])

    @classmethod
    def of(cls, folder: Path) -> Start:
        """Those of a finished run's best pair.

        Raises:
            UserError: it is not finished, or its files are not those that it left.
        """
        run = read_finished(folder)
        name = f"{parts_of(run.result['task'])[1]}-{cls('', folder, run)._method}-seed{run.result['seed']}"
        return cls(re.sub(r"[^\w-]+", "-", name), folder, run)


def starts_of(folders: Sequence[Path]) -> list[Start]:
    """The runs' weights, and last the base's: a run that cannot be begun from is so refused before anything is spent.

    Raises:
        UserError: runs of one name, of other base models, or with adapters of other shapes than each other.
    """
    starts = [Start.of(folder) for folder in folders]
    for name in {start.name for start in starts}:
        same = [str(start.folder) for start in starts if start.name == name]
        if len(same) > 1:
            raise UserError(f"--from has {len(same)} runs of one task, method and seed ({', '.join(same)}): give one")
    policies = [start.run.policy for start in starts if start.run]
    for what, values in (
        ("base models", {made.fingerprint for made in policies if made.fingerprint}),
        ("adapter shapes", {json.dumps(made.lora.to_dict(), sort_keys=True) for made in policies}),
    ):
        if len(values) > 1:
            raise UserError(f"--from has runs with {len(values)} {what}, which cannot be compared: give those of one")
    return [*starts, Start(BASE)]


def plasticity_jobs(
    task: str, folder: Path, starts: Sequence[Start], seeds: Sequence[int], common: Common
) -> list[Job]:
    """Every start x seed, seeds outermost."""
    shapes = [start.run.policy.lora for start in starts if start.run]
    lora = tuple(f"lora.{name}={json.dumps(value)}" for name, value in shapes[0].to_dict().items()) if shapes else ()
    same = lora if shapes and shapes[0] != LoraConfig() else ()
    return [
        Job(
            task,
            f"{METHOD}+from-{start.name}",
            seed,
            folder / f"{METHOD}+from-{start.name}-seed{seed}",
            common,
            same if start.run is None else (),
            start_from=start.folder,
        )
        for seed in seeds
        for start in starts
    ]


def check_starts(jobs: Sequence[Job]) -> None:
    """Raises UserError where a folder holds a run that began with other weights."""
    for job in jobs:
        path = RunFiles(job.folder).config
        wanted = None if job.start_from is None else origin_of(read_finished(job.start_from))
        if path.exists() and read_config(path)["policy"].get("started_from") != wanted:
            raise UserError(f"{job.folder} holds a run that began with other weights: give another --out")


def measure(job: Job, start: Start) -> dict[str, Any]:
    """A finished run's row."""
    run = read_run(job.folder)
    result = run.result
    scores = ("val_score_before", "val_score_after", "test_score_before", "test_score_after", "kl_to_base", "steps")
    return {
        **told_of(job.task, METHOD, job.seed),
        "run": job.label,
        **start.row,
        **{name: result[name] for name in scores},
        "rollouts": result["rollouts"]["fast"] + result["rollouts"]["slow"],
        "area": area(run.curve),
        "curve": [[point.rollouts, point.score, point.kl] for point in run.curve],
    }


def area(curve: Curve) -> float:
    """The mean height of a learning curve over its rollouts, straight between evaluations: how fast it was learned.

    The score itself where nothing was learned from.
    """
    spent = curve[-1].rollouts - curve[0].rollouts
    summed = sum((after.rollouts - one.rollouts) * (one.score + after.score) / 2 for one, after in pairwise(curve))
    return summed / spent if spent else curve[-1].score


def curves_by_start(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Point]]]:
    """The method that made the weights -> its learning curves."""
    found: dict[str, list[list[Point]]] = {}
    for row in rows:
        found.setdefault(row["start"], []).append([Point(*point) for point in row["curve"]])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One row a start: means over its runs."""
    head = ("weights from", "runs", "KL there", "test before", "test after", "mean height", "KL after")
    found = []
    for start in dict.fromkeys(row["start"] for row in rows):
        own = [row for row in rows if row["start"] == start]
        columns = ("start_kl", "test_score_before", "test_score_after", "area", "kl_to_base")
        means = [[row[name] for row in own if row.get(name) is not None] for name in columns]
        found.append([start, str(len(own)), *(f"{mean(some):.3f}" if some else "-" for some in means)])
    return head, found
