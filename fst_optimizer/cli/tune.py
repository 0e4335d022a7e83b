"""`fst tune`: its options, and what it shows while trials run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, this_command, user_errors
from fst_optimizer.cli.options import Preset, ReflectionLM, Task, TestSize, TrainSize, ValSize
from fst_optimizer.progress.tables import rich_table, say, show
from fst_optimizer.task_run import RunRequest, Sizes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fst_optimizer.tuning.request import TuneRequest
    from fst_optimizer.tuning.workers import ShowRows


Study = Annotated[str | None, typer.Option(help="The study's name. [default: from TASK and seed]")]
Folder = Annotated[
    Path | None, typer.Option("--dir", help="The folder of trials and results. [default: runs/tune-STUDY]")
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="The study's database: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DB, or another that Optuna "
        "knows. [default: SQLite in the study's folder]"
    ),
]
Trials = Annotated[
    int, typer.Option(help="N, the finished trials that the study shall have in total.", show_default=False)
]
Workers = Annotated[int, typer.Option(help="Processes here that run trials. Above 1, each gets one thread.")]
SpaceFile = Annotated[Path | None, typer.Option(help="A JSON file with the search space. [default: the one in docs]")]
Sampler = Annotated[str, typer.Option(help="tpe, random, qmc, gp, cmaes, nsgaii, nsgaiii or brute_force.")]
Pruner = Annotated[str, typer.Option(help="hyperband, median, wilcoxon or none.")]
Objectives = Annotated[
    str,
    typer.Option(help="score, or score and some of rollouts, dollars, seconds, kl_to_base: then nothing is pruned."),
]
BudgetRollouts = Annotated[
    int | None, typer.Option(help="Most training rollouts of the whole study. [default: no limit]")
]
Repeats = Annotated[
    int,
    typer.Option(
        help="More seeds for the leading configurations, and for the winner beside the preset on the test set."
    ),
]
Model = Annotated[str | None, typer.Option(help="As for fst compile. [default: the task's own]")]
Engine = Annotated[str | None, typer.Option(help="As for fst compile. [default: torch]")]
Url = Annotated[str | None, typer.Option(help="As for fst compile.")]
Method = Annotated[str | None, typer.Option(help="As for fst compile. [default: the task's, or fst]")]
Seed = Annotated[int, typer.Option(min=0, help="Of all trials, and of the sampler.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A JSON file of nested settings for all trials.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of all trials.")]
Heartbeat = Annotated[int, typer.Option(min=1, hidden=True)]


def tune_command(
    task: Task,
    trials: Trials,
    storage: Storage = None,
    study: Study = None,
    workers: Workers = 1,
    folder: Folder = None,
    sampler: Sampler = "tpe",
    pruner: Pruner = "hyperband",
    objectives: Objectives = "score",
    budget_rollouts: BudgetRollouts = None,
    repeats: Repeats = 0,
    space: SpaceFile = None,
    model: Model = None,
    engine: Engine = None,
    url: Url = None,
    reflection_lm: ReflectionLM = None,
    method: Method = None,
    seed: Seed = 0,
    auto: Preset = None,
    config: ConfigFile = None,
    sets: Sets = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
    heartbeat_s: Heartbeat = 20,
) -> None:
    """Search for a task's settings with Optuna.

    Writes best.json, tune.json, report.md, plots/ and trials/ into the study's folder.

    Every trial is a run of FST in a directory of its own, at most as many training rollouts long as the run without a
    search would be (--set budget.max_rollouts=N for another cap). The same command with a larger --trials goes on with
    the study, with the same it reports; elsewhere, with the same --storage, it brings more workers.

    Try:

        fst tune programs/letters --trials 20
        fst tune programs/letters --trials 40 --workers 2 --repeats 3
        fst tune TASK --trials 100 --storage postgresql://me:secret@host/studies --objectives score,rollouts
        fst compile programs/letters --config runs/tune-letters-0/best.json --run-dir runs/best
    """
    with user_errors("the same command goes on where this stopped"):
        from fst_optimizer.store.files import read_json
        from fst_optimizer.tuning.request import make_request

        own_space = read_json(space) if space else None
        search = {"sampler": sampler, "pruner": pruner, "objectives": objectives}
        amount = {"trials": trials, "budget_rollouts": budget_rollouts, "repeats": repeats}
        where = {"storage": storage, "heartbeat_s": heartbeat_s, "workers": workers}
        request = make_request(task, seed, study, folder, own_space, {**search, **amount, **where})
        flags = {"method": method, "seed": seed}
        sizes = Sizes(train_size, val_size, test_size)
        _search(
            request,
            RunRequest(
                task, request.folder, model, engine, url, reflection_lm, auto, config, flags, tuple(sets or ()), sizes
            ),
        )


def _search(request: TuneRequest, choices: RunRequest) -> None:
    from fst_optimizer.store.files import write_json
    from fst_optimizer.tuning.confirm import confirm_winner, repeats_of_task
    from fst_optimizer.tuning.request import join_study, plan_task_study
    from fst_optimizer.tuning.summary import finish_study
    from fst_optimizer.tuning.worker import write_command
    from fst_optimizer.tuning.workers import run_workers

    out, progress = consoles()
    plan = plan_task_study(request, choices)
    study = join_study(request, plan)
    write_json(request.folder / "space.json", dict(request.space))
    write_command(request, choices)
    with shown_trials(progress, request.trials, plan.cap) as show_rows:
        run_workers(request, plan, study, show_rows)
    confirm = None
    if request.repeats:
        run_repeats = repeats_of_task(request, choices, plan, partial(say, progress))
        confirm = partial(confirm_winner, plan=plan, request=request, run_repeats=run_repeats)
    with quiet_libraries(progress):
        summary = finish_study(study, plan, request.folder, confirm, command=this_command())
    show(out, closing(summary, request.folder, request.trials))


@contextmanager
def shown_trials(console: Console, trials: int, cap: int) -> Iterator[ShowRows]:
    """Takes the rows of a study again and again, and prints a line for each trial that starts or ends.

    On a terminal the lines scroll above a bar with the finished trials, their rollouts and the time left. Trials that
    had ended before the first call are not printed. On the bar, a running trial counts by its share of the `cap` of
    training rollouts.
    """
    from rich import progress

    from fst_optimizer.tuning.report import trial_line

    states: dict[int, str] | None = None
    columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[rollouts]}")
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())

    def update(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal states
        done = 0.0
        for row in rows:
            state = row["state"]
            if state in ("complete", "pruned"):
                done += 1
            elif state == "running":
                done += min(1.0, row["rollouts"] / cap)
            is_news = state == "running" if states is None else states.get(row["trial"]) != state != "waiting"
            if is_news:
                say(console, trial_line(row))
        states = {row["trial"]: row["state"] for row in rows}
        bar.update(task, completed=done, rollouts=f"{sum(row['rollouts'] for row in rows)} rollouts")

    with progress.Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("trials", total=trials, rollouts="")
        yield update


def closing(summary: Mapping[str, Any], folder: Path, trials: int) -> list[Table | str]:
    """The trials, and what to do with the best one."""
    from fst_optimizer.tuning.report import HEAD, cells, pruning_text

    states = summary["states"]
    done = states.get("complete", 0) + states.get("pruned", 0)
    texts = [f"finished  {done} of {trials} trials, {summary['rollouts']} training rollouts"]
    if states.get("running"):
        texts.append(f"running   {states['running']} more, by other workers, or lost with one")
    elif done < trials:
        texts.append("stopped   the budget of rollouts has no room for another trial")
    if text := pruning_text(summary):
        texts.append(text)
    if found := summary.get("confirmation"):
        texts.append(f"verdict   trial {summary['best']} beside {found['name']} on the test set: {found['verdict']}")
    texts.append(f"files     {folder}/ (report.md, tune.json, plots/, trials/)")
    if summary["best"] is not None:
        best = folder / "best.json"
        texts.append(f"best      trial {summary['best']}: {best}")
        texts.append(f"use it    fst compile {summary['task']} --config {best} --run-dir runs/best")
    rows = [cells(row) for row in summary["trials"]]
    return [rich_table(f"study {summary['study']}", HEAD, rows), "\n".join(texts)]
