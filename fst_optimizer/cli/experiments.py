"""`fst lab decompose`, `drift`, `plasticity` and `ceiling`: the paper's experiments on any task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, scoring_bar, this_command, user_errors
from fst_optimizer.cli.lab import (
    AGAIN,
    Config,
    Jobs,
    MaxRollouts,
    MethodInstructions,
    MethodSets,
    Out,
    Sets,
    lab,
)
from fst_optimizer.cli.options import ModelAsCompile, ReflectionLM, TestSize, TrainSize, ValSize
from fst_optimizer.errors import UserError, need_extra
from fst_optimizer.progress.tables import rich_table, say
from fst_optimizer.task_run import Sizes

if TYPE_CHECKING:
    from fst_optimizer.lab.measuring import Bench
    from fst_optimizer.lab.plan import Common, Job
    from fst_optimizer.lab.subjects import Subject

MEASURED = "measured"
"""The folder, in --out, of what was measured already."""

DEFAULT = "fst,rl,sequential"
MaybeTasks = Annotated[
    list[str] | None,
    typer.Argument(metavar="TASK", help="Tasks whose runs are used, and made where they lack."),
]
Runs = Annotated[
    list[Path] | None,
    typer.Option(
        help="With TASK: the folder of the runs, as fst lab compare --out has it; what it lacks is made there. "
        "[default: --out] Without TASK: finished run directories, or folders of them; may be repeated."
    ),
]
OwnMethods = Annotated[
    str | None,
    typer.Option(
        help="Of fst, rl, gepa, sequential, once; fst@vllm, rl+LABEL as for fst lab compare. [default: with TASK "
        "fst,rl,sequential, without it all that are found]"
    ),
]
Kinds = Annotated[str | None, typer.Option(help="Kinds of feedback, as for fst lab compare.")]
Seeds = Annotated[str, typer.Option(help="Every method is run once with each, or each: as for fst lab compare.")]
MeasuringEngine = Annotated[
    str | None, typer.Option(help="What generates while measuring: torch or vllm. [default: what the run used]")
]


@lab.command("decompose")
def decompose_command(
    out: Out,
    tasks: MaybeTasks = None,
    runs: Runs = None,
    methods: OwnMethods = None,
    kinds: Kinds = None,
    seeds: Seeds = "0,1,2",
    max_rollouts: MaxRollouts = 4000,
    sets: Sets = None,
    set_method: MethodSets = None,
    instructions: MethodInstructions = None,
    jobs: Jobs = 1,
    model: ModelAsCompile = None,
    engine: MeasuringEngine = None,
    reflection_lm: ReflectionLM = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """What the prompt learned, and what the weights: each run's four scores on the same test examples.

    The task's own or the evolved instructions, on the base's or the trained weights, scored greedily by the run's own
    code. Differences are paired by example; the interaction is what both bring beyond the sum of each alone. Runs are
    those of fst lab compare: --runs takes its folder.

    Leaves decompose.json and decompose.png in OUT. The same command goes on where it stopped.

    Try:

        fst lab decompose programs/letters:sort-rotate --methods fst,rl,sequential --seeds 0,1,2 --out runs/decompose
        fst lab decompose programs/letters:sort-rotate --runs runs/compare --out runs/decompose
        fst lab decompose --runs runs/first --runs runs/second --out runs/decompose
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import decompose

        sizes = Sizes(train_size, val_size, test_size)
        console, progress = consoles()
        need_extra("lab", "matplotlib", "scipy")
        common = _common(max_rollouts, sets, model, sizes, config, reflection_lm)
        chosen = Chosen(methods, kinds, seeds, set_method or (), instructions or ())
        found = _subjects(tasks, runs or [], out, chosen, common, jobs, progress)

        def measure(bench: Bench) -> list[dict[str, Any]]:
            return [decompose.measure(bench, test_size)]

        rows = _measured(found, out, progress, measure, model=model, engine=engine)
        _show(console, "decompose", "Test score by weights and instructions", decompose.table(rows), rows, out)


@lab.command("drift")
def drift_command(
    out: Out,
    tasks: MaybeTasks = None,
    runs: Runs = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="TASK2", help="Also measure on this task's test set; may be repeated."),
    ] = None,
    methods: OwnMethods = None,
    kinds: Kinds = None,
    seeds: Seeds = "0,1,2",
    points: Annotated[int, typer.Option(min=3, help="Ends of cycles that a run made here keeps, about.")] = 8,
    probe_size: Annotated[int, typer.Option(min=1, help="Examples of each probe.")] = 16,
    on_size: Annotated[int, typer.Option(min=1, help="Examples of each --on task.")] = 64,
    kl_size: Annotated[int, typer.Option(min=1, help="Of these, examples that the KL is sampled on.")] = 8,
    max_rollouts: MaxRollouts = 4000,
    sets: Sets = None,
    set_method: MethodSets = None,
    instructions: MethodInstructions = None,
    jobs: Jobs = 1,
    model: ModelAsCompile = None,
    engine: MeasuringEngine = None,
    reflection_lm: ReflectionLM = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """How far the weights move from the base along a run, and what they unlearn of other tasks.

    At the start and at ends of cycles: score and KL on the run's own prompts; on the task's probes, which are other
    variants of it with the right instruction (its probes() and instructions()); and on --on tasks, with their right
    instruction or their own. Probes and other tasks are the same prompts for every method, so that KLs compare.

    A run has only the adapters that it kept: those made here are told to, others need --set run.keep_versions=8 when
    they are made.

    Leaves drift.json and drift.png in OUT. The same command goes on where it stopped.

    Try:

        fst lab drift programs/letters:sort-rotate --methods fst,rl,sequential --seeds 0,1,2 --out runs/drift
        fst lab drift programs/letters --runs runs/compare --out runs/drift
        fst lab drift my/task --on programs/math --out runs/drift
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import drift
        from fst_optimizer.lab.measuring import exam_on, probes_of
        from fst_optimizer.tasks import load_task

        sizes = Sizes(train_size, val_size, test_size)
        console, progress = consoles()
        need_extra("lab", "matplotlib", "scipy")
        others = {name: exam_on(load_task(name), None, on_size, name) for name in on or ()}
        if not others:
            for name in tasks or ():
                drift.check_probes(load_task(name))
        keep = f"run.keep_versions={points}"
        common = _common(max_rollouts, [keep, *(sets or ())], model, sizes, config, reflection_lm)
        chosen = Chosen(methods, kinds, seeds, set_method or (), instructions or ())
        found = _subjects(tasks, runs or [], out, chosen, common, jobs, progress)
        for subject in found:
            drift.kept_places(subject)
            if not others:
                drift.check_probes(subject.task)

        def measure(bench: Bench) -> list[dict[str, Any]]:
            return drift.measure(bench, probes_of(bench.subject.task, probe_size), others, kl_size)

        rows = _measured(found, out, progress, measure, model=model, engine=engine)
        _show(console, "drift", "Before and after", drift.table(rows), rows, out)


@lab.command("plasticity")
def plasticity_command(
    out: Out,
    to: Annotated[str, typer.Option("--to", metavar="TASK2", help="The second task.", show_default=False)],
    sources: Annotated[
        list[Path],
        typer.Option(
            "--from",
            metavar="RUN_DIR",
            help="A finished run on the same base model; may be repeated.",
            show_default=False,
        ),
    ],
    seeds: Annotated[str, typer.Option(help="From each start, one run with each.")] = "0",
    max_rollouts: MaxRollouts = 4000,
    sets: Sets = None,
    jobs: Jobs = 1,
    model: ModelAsCompile = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """Can the weights still learn? Fresh RL on a second task, from the base and from what runs left.

    All runs have the second task's own instructions, a fresh optimizer, the same settings and the same cap of rollouts;
    only the weights that they begin with differ. Each is an ordinary run directory, OUT/VARIANT2/rl+from-START-seedN,
    as fst compile --start-from makes it; its config.json says where it began.

    Leaves plasticity.json and plasticity.png in OUT. The same command goes on where it stopped.

    Try:

        fst lab plasticity --from runs/a/fst-seed0 --from runs/a/rl-seed0 --to programs/letters:reverse-drop --out runs
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import cells, plan, plasticity

        console, progress = consoles()
        need_extra("lab", "matplotlib", "scipy")
        starts = plasticity.starts_of(sources)
        common = _common(max_rollouts, sets, model, Sizes(train_size, val_size, test_size), config, None)
        folder = out / plan.variant_name(to)
        todo = plasticity.plasticity_jobs(to, folder, starts, cells.parse_seeds(seeds, 1)[0], common)
        plasticity.check_starts(todo)
        _make(todo, jobs, progress)
        by_folder = {start.folder: start for start in starts}
        rows = [plasticity.measure(job, by_folder[job.start_from]) for job in todo]
        _show(console, "plasticity", f"RL on {to}, means over runs", plasticity.table(rows), rows, out)


@lab.command("ceiling")
def ceiling_command(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Comparisons (compare.json, or folders of them), or run directories.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder of the JSON and the figure.", show_default=False)],
) -> None:
    """Where learning curves level off, with how sure that is, from runs that are there: nothing is run.

    The paper's fit, R - R0 = (A - R0) / (1 + (C_mid / C)^B), C being training rollouts. A curve that still rises fits
    it as well, with a ceiling that nobody has seen: one is told only where the curve bends, which is where an F test
    prefers the fit to a power law, and more than half of the way was measured. The interval is a bootstrap over
    residuals.

    Leaves ceiling.json and ceiling.png in OUT.

    Try:

        fst lab ceiling runs/compare --out runs/ceiling
        fst lab ceiling runs/first runs/second --out runs/ceiling
    """
    with user_errors("run it again"):
        from fst_optimizer.lab import ceilings

        console, _ = consoles()
        need_extra("lab", "matplotlib", "scipy")
        rows = [ceilings.measure(row) for row in ceilings.curves_in(places)]
        _show(console, "ceiling", "Ceilings", ceilings.table(rows), rows, out)


def _common(
    max_rollouts: int,
    sets: Sequence[str] | None,
    model: str | None,
    sizes: Sizes,
    config: Path | None,
    reflection_lm: str | None,
) -> Common:
    from fst_optimizer.lab.plan import Common

    return Common(max_rollouts, tuple(sets or ()), model, sizes, config, reflection_lm)


@dataclass(frozen=True)
class Chosen:
    """Which runs of tasks are asked for, as the command line has it."""

    methods: str | None
    kinds: str | None
    seeds: str
    set_method: Sequence[str]
    instructions: Sequence[str]


def _subjects(
    tasks: Sequence[str] | None,
    runs: Sequence[Path],
    out: Path,
    chosen: Chosen,
    common: Common,
    at_once: int,
    progress: Any,
) -> list[Subject]:
    """The finished runs to measure; with tasks, those that lack are made first.

    Raises:
        UserError: nothing says which runs, or which folder of them.
    """
    from fst_optimizer.config.run import METHODS
    from fst_optimizer.lab import cells, subjects
    from fst_optimizer.lab import methods as by_name

    names = None if chosen.methods is None and not tasks else by_name.parse_methods(chosen.methods or DEFAULT)
    if strange := [name for name in names or () if by_name.plain(name) not in METHODS]:
        raise UserError(f"--methods has {strange[0]!r}, which leaves no weights to measure: give those of fst compile")
    if not tasks:
        if not runs:
            raise UserError("neither TASK nor --runs is given: name a task, or the folders of finished runs")
        return [subjects.subject_of(folder) for folder in subjects.finished_runs(runs, names)]
    if len(runs) > 1:
        raise UserError(f"--runs is given {len(runs)} times, and TASK too: give one folder, that of all their runs")
    assert names is not None
    own = cells.Own(by_name.by_method(chosen.set_method), by_name.files_by_method(chosen.instructions, names))
    seeds, kinds = cells.parse_seeds(chosen.seeds, len(tasks)), by_name.parse_kinds(chosen.kinds)
    work = cells.comparison_cells(tasks, runs[0] if runs else out, names, seeds, common, own, kinds)
    entries = [entry for cell in work for entry in cell.entries]
    _make(cells.distinct_jobs(entries), at_once, progress)
    return subjects.subjects_of(entries)


def _make(jobs: Sequence[Job], at_once: int, progress: Any) -> None:
    from fst_optimizer.lab.launch import run_all
    from fst_optimizer.lab.plan import check_jobs

    check_jobs(jobs)
    run_all(jobs, at_once=at_once, tell=partial(say, progress))


def _measured(
    subjects: Sequence[Subject], out: Path, progress: Any, measure: Any, *, model: str | None, engine: str | None
) -> list[dict[str, Any]]:
    """Rows of every run, told one by one."""
    from fst_optimizer.lab.measuring import Bench, Memory

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries(progress))
        for number, subject in enumerate(subjects, 1):
            with scoring_bar(progress) as bar:
                memory = Memory(out / MEASURED)
                with Bench(subject, memory, model=model, engine=engine, on_progress=bar) as bench:
                    rows += measure(bench)
            say(progress, f"[{number}/{len(subjects)}] {subject.label} measured")
    return rows


def _show(console: Any, name: str, title: str, table: Any, rows: Sequence[dict[str, Any]], out: Path) -> None:
    from fst_optimizer.lab.outcome import write_outcome

    paths = write_outcome(name, rows, out, this_command())
    console.print(rich_table(title, *table))
    for path in paths:
        say(console, f"wrote {path}")
