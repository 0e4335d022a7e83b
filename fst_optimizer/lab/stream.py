"""`fst lab stream`: tasks one after the other in one uninterrupted run, method by method.

A run is made by `stream_run`, in a process of its own; here it is planned, checked and read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.errors import UserError
from fst_optimizer.lab.plan import Common, Job, check_jobs, variant_name
from fst_optimizer.lab.subjects import told_of
from fst_optimizer.stats import mean
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.stream import stream_config
from fst_optimizer.task_run import plan_run
from fst_optimizer.tasks import Task, load_task

METHODS = ("fst", "rl", "sequential", "once")
SHARE = 0.9
"""Of a stage's best score: where it counts as recovered."""
LONGEST_NAME = 120


@dataclass(frozen=True)
class StreamJob(Job):
    """A run over several tasks; `task` is the first."""

    tasks: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """A module with arguments."""
        given = [part for part in super().command()[3:] if part != "--resume"]
        return ["fst_optimizer.lab.stream_run", *self.tasks, *given]


def stream_jobs(
    tasks: Sequence[str],
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    stage_rollouts: int,
    common: Common,
    own_sets: Mapping[str, Sequence[str]],
) -> list[StreamJob]:
    """Every seed x method, in OUT/TASK1-then-TASK2.../METHOD-seedN. `common.max_rollouts` is that of all stages."""
    folder = out / "-then-".join(map(variant_name, tasks))[:LONGEST_NAME]
    stage = (f"budget.stage_rollouts={stage_rollouts}",)
    return [
        StreamJob(
            tasks[0],
            method,
            seed,
            folder / f"{method}-seed{seed}",
            common,
            (*stage, *own_sets.get(method, ())),
            tasks=tuple(tasks),
        )
        for seed in seeds
        for method in methods
    ]


def check_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of a stream, which share everything but their examples.

    Raises:
        UserError: fewer than two or one twice; other modules, and so other metrics; other predictors, fields or
            instructions; or another reflection LM.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"a stream of {', '.join(names)}: give two or more tasks, each once")
    tasks = [load_task(name) for name in names]
    first = tasks[0]
    for other in tasks[1:]:
        if other.module is not first.module:
            raise UserError(
                f"tasks {first.name!r} and {other.name!r} have metrics of their own: give variants of one task"
            )
        for what, one, two in zip(
            ("predictors and fields", "instructions", "reflection LMs"), _shape(first), _shape(other), strict=True
        ):
            if one != two:
                raise UserError(
                    f"tasks {first.name!r} and {other.name!r} have other {what} ({one}; {two}): give tasks that one "
                    "program can do, from one instruction that tells of none"
                )
    return tasks


def _shape(task: Task) -> tuple[Any, ...]:
    """What all tasks of a stream share: predictors with their fields, instructions, whom it asks for new ones."""
    from fst_optimizer.program.texts import seed_texts

    program, lm = task.build_program(), task.reflection_lm()
    fields = {
        name: [*one.signature.input_fields, "->", *one.signature.output_fields]
        for name, one in program.named_predictors()
    }
    return fields, seed_texts(program), getattr(lm, "model", lm)


def check_streams(jobs: Sequence[StreamJob]) -> None:
    """Every run can be made, and those that lie there are over these tasks with these settings.

    Raises:
        UserError: as `check_jobs`, or what a stream cannot have.
    """
    check_jobs(jobs)
    for job in jobs:
        stream_config(plan_run(job.request).settings.config, len(job.tasks))
        path = RunFiles(job.folder).config
        if path.exists():
            there = [one["name"] for one in read_config(path)["data"].get("stages", ())]
            if there != list(job.tasks):
                raise UserError(f"{job.folder} holds a run over other tasks ({', '.join(there)}): give another --out")


def measure(job: StreamJob) -> list[dict[str, Any]]:
    """A finished run's rows, one a stage."""
    files = RunFiles(job.folder)
    told = [{**told_of(task, job.plain_method, job.seed), "method": job.method, "run": job.label} for task in job.tasks]
    rows = stage_rows(read_json(files.result), read_metrics(files.metrics))
    return [{**one, **row} for one, row in zip(told, rows, strict=False)]


def stage_rows(result: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What came of every stage, by a run's `result.json` and the lines of its `metrics.jsonl`.

    Rollouts are fast and slow ones since the stage began. The first switch that was noticed after a stage began is the
    one; every other, and every one in the first stage, was false.
    """
    ends, lines = result["stages"], list(lines)
    rows = []
    for place, end in enumerate(ends):
        name, start = end["name"], ends[place - 1]["rollouts"] if place else 0
        own = [line for line in lines if line["stage"] == name]
        curve = [
            [_spent(line) - start, line["score"], line["kl_to_base"]]
            for line in own
            if line["kind"] == "eval" and line["split"] == "val"
        ]
        switches = [_spent(line) - start for line in own if line.get("switch")]
        before = ends[place - 1]["scores"] if place else result["stage_scores_before"]
        best = max(score for _, score, _ in curve)
        rows.append(
            {
                "place": place,
                "start": start,
                "rollouts": end["rollouts"] - start,
                "score_before": before[name],
                "score": end["scores"][name],
                "score_at_the_end": ends[-1]["scores"][name],
                "forgotten": end["scores"][name] - ends[-1]["scores"][name],
                "scores_before": before,
                "scores": end["scores"],
                "best": best,
                "recovered_rollouts": next(spent for spent, score, _ in curve if score >= SHARE * best),
                "detected": bool(place and switches),
                "delay": switches[0] if place and switches else None,
                "false_alarms": max(0, len(switches) - (place > 0)),
                "switches": switches,
                "kl_to_base": end["kl_to_base"],
                "curve": curve,
            }
        )
    return rows


def _spent(line: Mapping[str, Any]) -> int:
    return int(line["rollouts"]["fast"] + line["rollouts"]["slow"])


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One row a method: means over stages and runs; what comes after a switch is of the later stages alone."""
    head = ("method", "runs", "score", "at end", "lost", "recover", "noticed", "delay", "false")
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        later = [row for row in own if row["place"]]
        delays = [row["delay"] for row in later if row["delay"] is not None]
        found.append(
            [
                method,
                str(len({row["run"] for row in own})),
                *(f"{mean([row[name] for row in own]):.3f}" for name in ("score", "score_at_the_end", "forgotten")),
                f"{mean([row['recovered_rollouts'] for row in later]):.0f}" if later else "-",
                f"{sum(row['detected'] for row in later)} of {len(later)}",
                f"{mean(delays):.0f}" if delays else "-",
                str(sum(row["false_alarms"] for row in own)),
            ]
        )
    return head, found


def forgetting(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[float]]]:
    """The tasks, and their mean scores over runs: before anything, and after each stage."""
    names = list(rows[0]["scores"])
    matrix = []
    for place in range(-1, len(names)):
        some = [row["scores_before" if place < 0 else "scores"] for row in rows if row["place"] == max(place, 0)]
        if some:
            matrix.append([mean([one[name] for one in some]) for name in names])
    return names, matrix
