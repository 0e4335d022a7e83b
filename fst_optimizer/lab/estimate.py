"""What a comparison will take, by the runs of it that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fst_optimizer.lab.plan import Job
from fst_optimizer.lab.tables import HeadAndRows
from fst_optimizer.stats import mean
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.text import clock


@dataclass(frozen=True)
class Estimate:
    """The runs of a method under one kind of feedback."""

    kind: str
    """"" where it reads none, or there are no kinds."""
    method: str
    runs: int = 0
    finished: int = 0
    seconds: float | None = None
    """Mean seconds of a finished one; else of this method under other kinds. None: not one is finished."""

    @property
    def left_s(self) -> float | None:
        """Seconds of those that are still to be made, one after the other."""
        left = self.runs - self.finished
        return 0.0 if not left else None if self.seconds is None else left * self.seconds


def kind_of(job: Job) -> str:
    """The kind of feedback in a run's task."""
    return job.task.partition(":")[2].partition("+")[2]


def estimates(jobs: Sequence[Job]) -> list[Estimate]:
    """What is to be made, and what it will take by the runs that are finished, as their `result.json` says."""
    taken: dict[Job, float] = {}
    for job in jobs:
        path = RunFiles(job.folder).result
        if path.exists():
            taken[job] = float(read_json(path)["wall_s"])
    found: dict[tuple[str, str], Estimate] = {}
    for job in jobs:
        key = kind_of(job), job.method
        one = found.get(key) or Estimate(*key, seconds=_mean_seconds(taken, *key))
        found[key] = replace(one, runs=one.runs + 1, finished=one.finished + (job in taken))
    return list(found.values())


def _mean_seconds(taken: Mapping[Job, float], kind: str, method: str) -> float | None:
    same = [seconds for job, seconds in taken.items() if job.method == method and kind_of(job) == kind]
    other = [seconds for job, seconds in taken.items() if job.method == method]
    return mean(same or other) if other else None


def plan_table(found: Sequence[Estimate]) -> HeadAndRows:
    """One row a method and kind of feedback."""
    return ("feedback", "method", "runs", "finished", "seconds a run", "left"), [
        [
            one.kind or "-",
            one.method,
            str(one.runs),
            str(one.finished),
            "-" if one.seconds is None else f"{one.seconds:.0f}",
            "?" if one.left_s is None else clock(one.left_s),
        ]
        for one in found
    ]


def plan_words(found: Sequence[Estimate], at_once: int) -> str:
    """How many runs there are, and how long those that are left will take, `at_once` at a time."""
    runs, finished = sum(one.runs for one in found), sum(one.finished for one in found)
    left_s = sum(one.left_s or 0.0 for one in found) / at_once
    unknown = [one for one in found if one.left_s is None]
    words = f"{runs} runs, {finished} finished; what is left takes about {clock(left_s)}, {at_once} at a time"
    if unknown:
        names = ", ".join(dict.fromkeys(one.method for one in unknown))
        count = sum(one.runs - one.finished for one in unknown)
        words += f", and {count} runs of methods of which none is finished yet: {names}"
    return words + ". Each run takes some seconds more to start."
