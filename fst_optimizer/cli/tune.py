"""`fst tune`: its options, and what it shows while trials run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, this_command, user_errors
from fst_optimizer.cli.options import TASK_HELP, Auto, TestSize, TrainSize, ValSize
from fst_optimizer.cli.tables import show
from fst_optimizer.task_run import Choices, Sizes

if TYPE_CHECKING:
    from rich.console import Console

    from fst_optimizer.tuning.workers import ShowRows


def tune_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)],
    trials: Annotated[
        int, typer.Option(help="N, the finished trials that the study shall have in total.", show_default=False)
    ],
    storage: Annotated[
        str | None,
        typer.Option(
            help="The study's database: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DB, or another that Optuna "
            "knows. [default: SQLite in the study's folder]"
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help="The study's name. [default: from TASK and seed]")] = None,
    workers: Annotated[int, typer.Option(help="Processes here that run trials. Above 1, each gets one thread.")] = 1,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The folder of trials and results. [default: runs/tune-STUDY]")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random, qmc, gp, cmaes, nsgaii, nsgaiii or brute_force.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="hyperband, median, wilcoxon or none.")] = "hyperband",
    objectives: Annotated[
        str,
        typer.Option(
            help="score, or score and some of rollouts, dollars, seconds, kl_to_base: then nothing is pruned."
        ),
    ] = "score",
    budget_rollouts: Annotated[
        int | None, typer.Option(help="Most training rollouts of the whole study. [default: no limit]")
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            help="More seeds for the leading configurations, and for the winner beside the preset on the test set."
        ),
    ] = 0,
    space: Annotated[
        Path | None, typer.Option(help="A JSON file with the search space. [default: the one in docs]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As for fst compile. [default: the task's own]")] = None,
    engine: Annotated[str | None, typer.Option(help="As for fst compile. [default: torch]")] = None,
    url: Annotated[str | None, typer.Option(help="As for fst compile.")] = None,
    method: Annotated[str | None, typer.Option(help="As for fst compile. [default: the task's, or fst]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all trials, and of the sampler.")] = 0,
    auto: Annotated[Auto | None, typer.Option(help="A preset under all other settings. [default: light]")] = None,
    config: Annotated[Path | None, typer.Option(help="A JSON file of nested settings for all trials.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of all trials.")
    ] = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
    heartbeat_s: Annotated[int, typer.Option(min=1, hidden=True)] = 20,
) -> None:
    """Search for a task's settings with Optuna.

    Every trial is a run of FST in a directory of its own, at most as many training rollouts long as the run without a
    search would be (--set budget.max_rollouts=N for another cap). The same command with a larger --trials goes on with
    the study, with the same it reports; elsewhere, with the same --storage, it brings more workers.

    Examples:
        fst tune programs/letters --trials 20

        fst tune programs/letters --trials 40 --workers 2 --repeats 3

        fst tune TASK --trials 100 --storage postgresql://me:secret@host/studies --objectives score,rollouts

        fst compile programs/letters --config runs/tune-letters-0/best.json --run-dir runs/best
    """
    with user_errors("the same command goes on where this stopped"):
        from fst_optimizer.tuning import ask as asking
        from fst_optimizer.tuning import command
        from fst_optimizer.tuning import workers as processes
        from fst_optimizer.tuning.show import closing as study_closing

        asking.need_tune()
        flags = {"method": method, "seed": seed}
        choices = Choices(
            task=task,
            run_dir=Path(),
            model=model,
            engine=engine,
            url=url,
            auto=auto.value if auto else None,
            config_file=config,
            flags={name: value for name, value in flags.items() if value is not None},
            sets=tuple(sets or ()),
            sizes=Sizes(train_size, val_size, test_size),
        )
        ask = asking.make_ask(
            choices,
            trials=trials,
            study=study,
            folder=folder,
            seed=seed,
            objectives=objectives,
            space_file=space,
            storage=storage,
            workers=workers,
            sampler=sampler,
            pruner=pruner,
            budget_rollouts=budget_rollouts,
            repeats=repeats,
            heartbeat_s=heartbeat_s,
        )
        out, progress = consoles()

        def tell(text: str) -> None:
            progress.print(text, markup=False, highlight=False, soft_wrap=True)

        prepared = asking.prepare(ask)
        found = command.join_study(ask, prepared)
        with shown_trials(progress, trials, prepared.plan.cap) as show_rows:
            processes.run_workers(ask, prepared.limits, found, show_rows)
        with quiet_libraries(progress):
            summary = command.finish(ask, prepared, found, this_command(), tell)
        show(out, study_closing(summary, ask.folder, trials))


@contextmanager
def shown_trials(console: Console, trials: int, cap: int) -> Iterator[ShowRows]:
    """Takes the rows of a study again and again, and prints a line for each trial that starts or ends.

    On a terminal the lines scroll above a bar with the finished trials, their rollouts and the time left. Trials that
    had ended before the first call are not printed.

    Args:
        console: Where to.
        trials: How many finished trials are wanted.
        cap: Training rollouts of one trial: a running one counts by its share of them.
    """
    from rich import progress

    from fst_optimizer.tuning.rows import trial_line
    from fst_optimizer.tuning.standing import FINISHED

    states: dict[int, str] | None = None
    columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[rollouts]}")
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())

    def update(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal states
        done = 0.0
        for row in rows:
            state = row["state"]
            done += 1.0 if state in FINISHED else min(1.0, row["rollouts"] / cap) if state == "running" else 0.0
            is_news = state == "running" if states is None else states.get(row["trial"]) != state != "waiting"
            if is_news:
                console.print(trial_line(row), markup=False, highlight=False, soft_wrap=True)
        states = {row["trial"]: row["state"] for row in rows}
        bar.update(task, completed=done, rollouts=f"{sum(row['rollouts'] for row in rows)} rollouts")

    with progress.Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("trials", total=trials, rollouts="")
        yield update
