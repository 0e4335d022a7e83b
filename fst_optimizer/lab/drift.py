"""`fst lab drift`: along a run, how far the weights move from the base, and what they unlearn of other tasks.

A run is measured at its start and at those ends of cycles whose adapters it kept (`run.keep_versions`): on its own
prompts, as it was evaluated while it went on; on the task's probes, each under its right instruction; and on other
tasks. Probes and other tasks are the same prompts for all methods, so that their KLs can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab.curves import at_cycle_ends
from fst_optimizer.lab.measuring import Bench, Exam
from fst_optimizer.lab.subjects import Subject, by_run
from fst_optimizer.run.record import check_version
from fst_optimizer.stats import mean
from fst_optimizer.store.files import ADAPTER, RunFiles
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.tasks import Task

OWN, PROBE, OTHER = "own", "probe", "other"
"""What a row is measured on: the run's validation set, a variant of its task, another task."""
SAID = {OWN: "its own validation", PROBE: "probes", OTHER: "other tasks"}
FEWEST = 3
"""Policy versions that a run of many must have kept, to be measured along."""
POINTS = 8
"""Ends of cycles that runs are told to keep."""


@dataclass(frozen=True)
class Place:
    """An evaluation of a run whose weights can be had again."""

    cycle: int
    """Cycles done."""
    step: int
    rollouts: int
    """Fast and slow rollouts so far."""
    policy_version: int
    score: float
    """On the validation set, under the leading instructions of that moment."""
    kl: float
    """To the base, in nats a token, on the same prompts."""


def places(lines: Iterable[Mapping[str, Any]], kept: Iterable[int]) -> list[Place]:
    """The start and the ends of cycles in a run's `metrics.jsonl` at version 0 or at one of `kept`."""
    there, found = {0, *kept}, dict[int, Place]()
    for line in at_cycle_ends(lines):
        if line["kind"] != "eval" or line["split"] != "val" or line["policy_version"] not in there:
            continue
        spent = line["rollouts"]["fast"] + line["rollouts"]["slow"]
        done = line["cycle"] + (spent > 0)
        one = Place(done, line["step"], spent, line["policy_version"], line["score"], line["kl_to_base"])
        if spent not in found or one.score > found[spent].score:
            found[spent] = one
    return [found[spent] for spent in sorted(found)]


def check_probes(task: Task) -> None:
    """Raises UserError where a task has nothing of its own to measure drift on."""
    if not task.probes():
        raise UserError(
            f"the task {task.name!r} has no probes, and drift is measured on prompts that all methods share: add --on "
            "TASK2, or give it probes() and instructions(), as 'Writing a task' in the docs has them"
        )


def kept_places(subject: Subject) -> list[Place]:
    """The places of a finished run, by the adapters that it has.

    Raises:
        UserError: it has nothing between its start and its end, or an adapter is not the one that it left.
    """
    files = subject.finished.files
    lines = read_metrics(files.metrics)
    trained = {line["policy_version"] for line in lines if line["kind"] == "eval"} - {0}
    kept = trained & versions_left(files, subject.run.result)
    told_to = subject.finished.config["config"].get("run", {}).get("keep_versions")
    if not told_to and len(kept) < min(FEWEST, len(trained)):
        raise UserError(
            f"the run in {str(files.root)!r} kept {len(kept)} of {len(trained)} policy versions, and drift is measured "
            f"along a run: make it again with --set run.keep_versions={POINTS}"
        )
    for version in kept:
        check_version(files, subject.run.result, version)
    return places(lines, kept)


def versions_left(files: RunFiles, result: Mapping[str, Any]) -> set[int]:
    """The versions that a finished run left, by its `result.json`; by its folder, where that says nothing of files."""
    listed = result.get("files")
    names = [name.split("/")[1] for name in listed if name.startswith("policy/")] if isinstance(listed, Mapping) else []
    names = names or [path.name for path in files.policy(0).parent.glob("*")]
    return {int(name.removeprefix("policy-")) for name in names if ADAPTER.fullmatch(name)}


def measure(bench: Bench, probes: Exam | None, others: Mapping[str, Exam], kl_size: int) -> list[dict[str, Any]]:
    """A run's rows: one for each place and what it was measured on."""
    rows = []
    for place in kept_places(bench.subject):
        at = {
            "cycle": place.cycle,
            "step": place.step,
            "rollouts": place.rollouts,
            "policy_version": place.policy_version,
        }
        rows.append(
            {
                **bench.subject.row,
                **at,
                "role": OWN,
                "on": bench.subject.task.name,
                "score": place.score,
                "kl": place.kl,
            }
        )
        exams = [(PROBE, probes)] if probes else []
        for role, exam in (*exams, *((OTHER, one) for one in others.values())):
            kls, scores = bench.kls(exam, place.policy_version, kl_size), bench.scores(exam, place.policy_version)
            rows += [
                {**bench.subject.row, **at, "role": role, "on": name, "score": mean(some), "kl": kls[name]}
                for name, some in scores.items()
            ]
    return rows


def along(rows: Iterable[Mapping[str, Any]], role: str) -> dict[tuple[Any, ...], list[dict[str, float]]]:
    """Run -> its places in order, each the mean over what it was measured on in this role."""
    found = {}
    for run, own in by_run(row for row in rows if row["role"] == role).items():
        at: dict[int, list[Mapping[str, Any]]] = {}
        for row in own:
            at.setdefault(row["rollouts"], []).append(row)
        found[run] = [
            {"rollouts": spent, "score": mean([row["score"] for row in some]), "kl": mean([row["kl"] for row in some])}
            for spent, some in sorted(at.items())
        ]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """One row a run and role: where it began and where it ended."""
    head = ("rule", "method", "seed", "measured on", "score before", "score after", "KL after")
    found = []
    for role in (OWN, PROBE, OTHER):
        for run, some in along(rows, role).items():
            row = next(row for row in rows if row["run"] == run[-1])
            first, last = some[0], some[-1]
            scores = [f"{first['score']:.3f}", f"{last['score']:.3f}", f"{last['kl']:.4f}"]
            found.append([row["rule"], row["method"], str(row["seed"]), SAID[role], *scores])
    return head, found
