"""`fst lab ...`: what is asked for on the command line, and what it shows.

A new measurement is one module in `fst_optimizer/lab` and one `@lab.command` here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, this_command, user_errors
from fst_optimizer.cli.options import ModelAsCompile, ReflectionLM, TestSize, TrainSize, ValSize
from fst_optimizer.errors import need_extra
from fst_optimizer.progress.tables import rich_table, say
from fst_optimizer.task_run import Sizes

if TYPE_CHECKING:
    from fst_optimizer.lab.cells import Cell
    from fst_optimizer.lab.launch import RunFailed
    from fst_optimizer.lab.plan import Job

lab = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure: compare methods at equal cost, sweep learning rates, write the results page.",
)

AGAIN = "the same command goes on where this stopped"
Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="One task or more, as for fst compile.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of all runs and results.", show_default=False)]
Methods = Annotated[
    str,
    typer.Option(
        help="Of fst, rl, gepa, sequential, once, sft, dspy-gepa, dspy-grpo, dspy-together. fst@vllm: on the vLLM "
        "engine. fst+k1: one prompt at a time. fst+adaptive: each cycle goes to the side that gains more. "
        "rl+sweep: the best of a small sweep. rl+own: with settings of its own by --set-method rl+own.NAME=VALUE."
    ),
]
MaxRollouts = Annotated[int, typer.Option(min=1, help="Fast and slow rollouts of each run, the same cap for all.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of all runs.")]
MethodSets = Annotated[
    list[str] | None,
    typer.Option("--set-method", metavar="METHOD.NAME=VALUE", help="A setting of one method, e.g. rl.train.lr=2e-3."),
]
MethodInstructions = Annotated[
    list[str] | None,
    typer.Option(
        "--instructions",
        metavar="METHOD=FILE.json",
        help="What the program of one method starts from instead of its own instructions: {predictor: text}.",
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time. Above 1, each gets one thread.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what it will take, by the finished runs; run nothing.")]
Config = Annotated[Path | None, typer.Option(help="A JSON file of nested settings for all runs.")]


@lab.command("compare")
def compare_command(
    tasks: Tasks,
    out: Out,
    methods: Methods = "fst,rl",
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of feedback, e.g. told,shown,scored: every task runs as TASK+KIND, and methods that read no "
            "feedback once for all of them. [default: the tasks as they are given]"
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Every method runs once with each. each: 0 for the first task, 1 for the second ...")
    ] = "0,1,2",
    max_rollouts: MaxRollouts = 4000,
    sets: Sets = None,
    set_method: MethodSets = None,
    instructions: MethodInstructions = None,
    sweep: Annotated[Path | None, typer.Option(help="A sweep.json whose learning rates are used.")] = None,
    jobs: Jobs = 1,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it will take, by its finished runs. Run nothing.")
    ] = False,
    model: ModelAsCompile = None,
    reflection_lm: ReflectionLM = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """Run methods x seeds at the same cap of rollouts; leave compare.json and figures.

    Every run is an ordinary run directory, OUT/VARIANT/METHOD-seedN. The comparison can be stopped at any time: the
    same command skips what is finished and resumes what is not. A run that fails does not stop the others.

    Try:

        fst lab compare programs/letters --methods fst,rl,gepa --seeds 0,1,2 --out runs/compare
        fst lab compare programs/letters --methods fst,fst+k1,rl,rl+sweep,sft --kinds told,shown --out runs/kinds --plan
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import cells, plan
        from fst_optimizer.lab import methods as by_name
        from fst_optimizer.lab import sweep as sweeping
        from fst_optimizer.store.files import read_json

        need_extra("lab", "matplotlib", "scipy")
        console, progress = consoles()
        names, numbers = by_name.parse_methods(methods), cells.parse_seeds(seeds, len(tasks))
        own = cells.Own(
            by_name.by_method(set_method or (), sweeping.picked_sets(sweep, names) if sweep else {}),
            by_name.files_by_method(instructions or (), names),
        )
        sizes = Sizes(train_size, val_size, test_size)
        common = plan.Common(max_rollouts, tuple(sets or ()), model, sizes, config, reflection_lm)
        work = cells.comparison_cells(tasks, out, names, numbers, common, own, by_name.parse_kinds(kinds))
        everything = cells.distinct_jobs(entry for cell in work for entry in cell.entries)
        plan.check_jobs(everything)
        if plan_only:
            return _show_plan(console, everything, jobs)
        failure = _failure_of(everything, jobs, progress)
        swept = {name: value for name, value in read_json(sweep).items() if name != "runs"} if sweep else {}
        extra = {
            "command": this_command(),
            "max_rollouts": max_rollouts,
            "sweep": swept,
            "reflection_lm": reflection_lm,
        }
        for cell in work:
            _compare(console, cell, extra)
        if failure:
            raise failure


@lab.command("sweep")
def sweep_command(
    tasks: Tasks,
    out: Out,
    methods: Methods = "fst,rl",
    lrs: Annotated[str, typer.Option(help="Learning rates to try.")] = "3e-4,1e-3,3e-3",
    seeds: Annotated[str, typer.Option(help="Other seeds than those of the comparison.")] = "100,101",
    max_rollouts: MaxRollouts = 2000,
    sets: Sets = None,
    set_method: MethodSets = None,
    jobs: Jobs = 1,
    model: ModelAsCompile = None,
    reflection_lm: ReflectionLM = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """Pick each method's learning rate, over tasks and seeds.

    Of the rates whose final validation score is within a standard error of the best, the one that levels off after
    the fewest rollouts.

    Try:

        fst lab sweep programs/letters --methods fst,rl --lrs 3e-4,1e-3,2e-3 --seeds 100,101 --out runs/sweep
        fst lab compare programs/letters --methods fst,rl --sweep runs/sweep/sweep.json --out runs/compare
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import methods as by_name
        from fst_optimizer.lab import plan, sweep, tables
        from fst_optimizer.lab.cells import parse_seeds

        console, progress = consoles()
        names, rates = by_name.parse_methods(methods), plan.parse_rates(lrs)
        (numbers,) = parse_seeds(seeds, 1)
        own = by_name.by_method(set_method or ())
        sizes = Sizes(train_size, val_size, test_size)
        common = plan.Common(max_rollouts, tuple(sets or ()), model, sizes, config, reflection_lm)
        everything = [
            job
            for folder, task in plan.by_folder(tasks).items()
            for job in sweep.sweep_jobs(task, out / folder, names, rates, numbers, common, own)
        ]
        plan.check_jobs(everything)
        _make_runs(everything, jobs, progress)
        extra = {"command": this_command(), "tasks": tasks, "seeds": list(numbers), "max_rollouts": max_rollouts}
        table = tables.sweep_table(sweep.save_sweep(everything, out, extra=extra))
        console.print(rich_table("Final validation score, and the rollouts to level off", *table))
        say(console, f"wrote {out / 'sweep.json'}")


@lab.command("bench")
def bench_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="As for fst compile.")] = "programs/letters",
    out: Annotated[Path, typer.Option("--out", help="The JSON file with the numbers.")] = Path("runs/bench.json"),
    examples: Annotated[int, typer.Option(min=1, help="Examples, each run G times.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contender; medians are shown.")] = 5,
    engine: Annotated[str, typer.Option(help="torch or vllm.")] = "torch",
    tokens: Annotated[int, typer.Option(min=1, help="With vllm: tokens of every completion.")] = 64,
    in_flight: Annotated[int, typer.Option(min=1, help="With vllm: calls at a time.")] = 32,
    reflection_s: Annotated[
        float | None, typer.Option(min=0, help="Instead: a fast round with a reflection LM that answers after so long.")
    ] = None,
    model: ModelAsCompile = None,
    sets: Sets = None,
) -> None:
    """Measure speed as ratios within one run: the collector over raw generate, the slow step over TRL's.

    With --engine vllm: the collector over raw requests to one vLLM server, beside a thread pool over dspy.Predict,
    every completion --tokens long. With --reflection-s: a fast round with one proposal after the other, and with
    fast.parallel_proposals of them in flight.

    Try:

        fst lab bench programs/letters --out runs/bench.json
        fst lab bench programs/letters --engine vllm --tokens 64 --in-flight 32 --out runs/serving.json
        fst lab bench programs/letters --reflection-s 3 --set fast.parallel_proposals=8 --out runs/reflection.json
    """
    with user_errors("run it again"):
        from fst_optimizer.lab.bench import bench
        from fst_optimizer.lab.compare import shown_model
        from fst_optimizer.lab.reflection_bench import reflection_bench
        from fst_optimizer.lab.serving_bench import endless_copy, serving_bench
        from fst_optimizer.store.files import write_json
        from fst_optimizer.task_run import RunRequest, make_policy, plan_run
        from fst_optimizer.tasks import load_task

        console, progress = consoles()
        source = Path(model or str(load_task(task).model()))
        own = (f"policy.max_tokens={tokens}", f"rollout.num_threads={in_flight}") if engine == "vllm" else ()
        with tempfile.TemporaryDirectory() as folder, quiet_libraries(progress):
            if engine == "vllm":
                model = str(endless_copy(source, Path(folder) / "model"))
            request = RunRequest(task=task, run_dir=out.parent, engine=engine, model=model, sets=(*own, *(sets or ())))
            plan = plan_run(request)
            measure = serving_bench if engine == "vllm" else bench
            if reflection_s is not None:
                measure = partial(reflection_bench, reflection_s=reflection_s)
            with closing(make_policy(request, plan)) as policy:
                numbers = measure(plan.task, policy, plan.settings.config, examples=examples, repeats=repeats)
        data = {"command": this_command(), "model": shown_model(str(source)), **numbers}
        write_json(out, data)
        for name, value in data.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            say(console, f"{name:30} {shown}")


@lab.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What fst lab commands left by --out, or --keep before.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("docs/results.md"),
    keep: Annotated[
        Path | None, typer.Option(help="First write the rows of DIR... into this folder, small, to keep them.")
    ] = None,
) -> None:
    """Write the results page from the JSON of comparisons and experiments, with the figures beside it.

    Try:

        fst lab report runs/table runs/drift --keep docs/results --out docs/results.md
        fst lab report docs/results --out docs/results.md
    """
    with user_errors("run it again"):
        need_extra("lab", "matplotlib", "scipy")
        from fst_optimizer.lab.report import write_report

        for path in write_report(folders, out, keep):
            say(consoles()[0], f"wrote {path}")


def _make_runs(jobs: Sequence[Job], at_once: int, progress: Any) -> None:
    from fst_optimizer.lab.launch import run_all

    run_all(jobs, at_once=at_once, tell=partial(say, progress))


def _failure_of(jobs: Sequence[Job], at_once: int, progress: Any) -> RunFailed | None:
    """Make the runs; what is to be raised once those that have a result are compared."""
    from fst_optimizer.lab.launch import RunFailed

    try:
        _make_runs(jobs, at_once, progress)
    except RunFailed as error:
        return error
    return None


def _show_plan(console: Any, jobs: Sequence[Job], at_once: int) -> None:
    from fst_optimizer.lab.estimate import estimates, plan_table, plan_words

    found = estimates(jobs)
    console.print(rich_table("Runs", *plan_table(found)))
    say(console, plan_words(found, at_once))


def _compare(console: Any, cell: Cell, extra: dict[str, Any]) -> None:
    """Write and show what the finished runs of a task came to."""
    from fst_optimizer.lab import compare, figures

    found = {entry: compare.read_entry(entry) for entry in cell.entries}
    runs = [run for run in found.values() if run]
    if not runs:
        say(console, f"{cell.folder}: no run is finished, so there is nothing to compare")
        return
    missing = [f"{entry.method}-seed{entry.seed}" for entry, run in found.items() if run is None]
    about = {"task": cell.task, "rule": cell.rule, "kind": cell.kind, "missing": missing}
    data = compare.save_comparison(runs, cell.folder, extra=about | extra)
    _show(console, data, [cell.folder / "compare.json", *figures.draw_all(data, cell.folder)])


def _show(console: Any, data: dict[str, Any], paths: Iterable[Path]) -> None:
    from fst_optimizer.lab import tables

    title = f"{data['task']}: means over seeds ± 95% interval, at most {data['max_rollouts']} training rollouts"
    console.print(rich_table(title, *tables.method_table(data, tables.format_ci_short)))
    if data["against_rl"]:
        table = tables.against_table(data["against_rl_at_cycle_ends"], tables.format_ci_short)
        console.print(rich_table("Reaching RL's best, at the ends of cycles", *table))
    for path in paths:
        say(console, f"wrote {path}")
