"""The runs that a comparison is made of, by rule and by kind of feedback.

    OUT/RULE+KIND/METHOD-seedN      a run, and beside it the compare.json of the rule under that kind
    OUT/RULE/METHOD-seedN           with kinds: a run of a method that reads no feedback; it serves all of them

Without kinds all runs of a task lie in OUT/RULE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fst_optimizer.config.overrides import assignments
from fst_optimizer.errors import UserError
from fst_optimizer.lab.methods import built_in, is_sweep, parts_of, plain, reads_feedback, sweep_points, swept
from fst_optimizer.lab.plan import Common, Job, by_folder
from fst_optimizer.task_run import plan_run

EACH = "each"
"""As `--seeds`: a seed of its own for every task."""


@dataclass(frozen=True)
class Entry:
    """What a method comes to with one seed: a run, or of a sweep the best of several."""

    method: str
    seed: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Cell:
    """A task under one kind of feedback: what one `compare.json` is about."""

    task: str
    rule: str
    """The task's folder, without the kind."""
    kind: str | None
    """None: the comparison was not asked for by kinds."""
    folder: Path
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Own:
    """What methods have of their own, each by its name in `--methods`."""

    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    instructions: Mapping[str, Path] = field(default_factory=dict)

    def sets_of(self, method: str) -> tuple[str, ...]:
        """A method's settings: those of its label, and over them those by hand.

        `once` does not search where its instructions are given.
        """
        given = plain(method) == "once" and method in self.instructions
        return (*built_in(method), *(["fast.once_rollouts=0"] if given else []), *self.sets.get(method, ()))

    def reads_feedback(self, method: str) -> bool:
        """Whether what the feedback says can change what the method learns."""
        settings = assignments(self.sets_of(method))
        return reads_feedback(method, {"fast": {"once_rollouts": settings.get("fast.once_rollouts")}})


def parse_seeds(text: str, tasks: int) -> list[tuple[int, ...]]:
    """`0,1,2`: these for every task. `each`: 0 for the first task, 1 for the second and so on, a seed a task."""
    if text.strip() == EACH:
        return [(number,) for number in range(tasks)]
    parts = parts_of(text)
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seeds is {text!r}: give whole numbers like 0,1,2, or {EACH} for one seed a task")
    return [tuple(int(part) for part in parts)] * tasks


def with_kind(task: str, kind: str) -> str:
    """The task under another kind of feedback: `programs/letters:pipeline` as `programs/letters:pipeline+shown`."""
    place, _, variant = task.partition(":")
    return f"{place}:{variant}+{kind}"


def comparison_cells(
    tasks: Sequence[str],
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[Sequence[int]],
    common: Common,
    own: Own,
    kinds: Sequence[str] = (),
) -> list[Cell]:
    """Every task, under every kind where there are some; `seeds` has those of each task.

    Raises:
        UserError: two tasks share a folder, or one names a kind where `kinds` does.
    """
    for task in tasks if kinds else ():
        if "+" in task.partition(":")[2]:
            raise UserError(f"the task {task!r} names a kind of feedback and --kinds others: leave one of both out")
    numbers = dict(zip(tasks, seeds, strict=True))
    cells = []
    for rule, task in by_folder(tasks).items():
        for kind in kinds or (None,):
            named = task if kind is None else with_kind(task, kind)
            folder = out / (rule if kind is None else f"{rule}+{kind}")
            blind = (named, folder) if kind is None else (task, out / rule)
            places = {method: (named, folder) if own.reads_feedback(method) else blind for method in methods}
            entries = tuple(
                Entry(method, seed, entry_jobs(*places[method], method, seed, common, own))
                for seed in numbers[task]
                for method in methods
            )
            cells.append(Cell(named, rule, kind, folder, entries))
    return cells


def entry_jobs(task: str, folder: Path, method: str, seed: int, common: Common, own: Own) -> tuple[Job, ...]:
    """The run of a method with a seed; of a sweep that of the plain method and one for each point of the grid."""
    texts = own.instructions.get(swept(method) if is_sweep(method) else method)

    def job(name: str, *sets: str) -> Job:
        return Job(task, name, seed, folder / f"{name}-seed{seed}", common, sets, texts)

    if not is_sweep(method):
        return (job(method, *own.sets_of(method)),)
    start = job(swept(method), *own.sets_of(swept(method)))
    points = sweep_points(plan_run(start.request).settings.config)
    over = (*start.sets, *own.sets.get(method, ()))
    return (start, *(job(f"{method}-{label}", *over, *sets) for label, sets in points.items()))


def comparison_jobs(
    task: str,
    folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    common: Common,
    own_sets: Mapping[str, Sequence[str]],
) -> list[Job]:
    """The runs of one task. Seeds outermost, so that a comparison that is stopped early has whole seeds."""
    own = Own(own_sets)
    return distinct_jobs(
        Entry(method, seed, entry_jobs(task, folder, method, seed, common, own)) for seed in seeds for method in methods
    )


def distinct_jobs(entries: Iterable[Entry]) -> list[Job]:
    """Every run once, in order: several kinds share those of methods that read no feedback."""
    return list({job.folder: job for entry in entries for job in entry.jobs}.values())
