"""`fst lab stream`: tasks in sequence in one run."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fst_optimizer.cli.console import consoles, this_command, user_errors
from fst_optimizer.cli.lab import AGAIN, Config, Jobs, MethodSets, Out, Sets, lab
from fst_optimizer.cli.options import ModelAsCompile, ReflectionLM, TrainSize, ValSize
from fst_optimizer.errors import UserError, need_extra
from fst_optimizer.progress.tables import rich_table, say
from fst_optimizer.task_run import Sizes


@lab.command("stream")
def stream_command(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK1 TASK2...", help="Variants of one task, in order.")],
    out: Out,
    methods: Annotated[
        str, typer.Option(help="Of fst, rl, sequential, once; rl+LABEL as for fst lab compare.")
    ] = "fst,rl,sequential",
    seeds: Annotated[str, typer.Option(help="Every method is run once with each.")] = "0",
    stage_rollouts: Annotated[int, typer.Option(min=1, help="Fast and slow rollouts on each task.")] = 2000,
    sets: Sets = None,
    set_method: MethodSets = None,
    jobs: Jobs = 1,
    model: ModelAsCompile = None,
    reflection_lm: ReflectionLM = None,
    config: Config = None,
    train_size: TrainSize = None,
    val_size: ValSize = None,
) -> None:
    """Tasks in sequence in one uninterrupted run that is not told when one ends: what is learned, noticed, forgotten.

    Weights, instructions and optimizer go on; the first instruction tells of no task. After each stage every task is
    scored, on validation examples that choose nothing. Told are: score by stage and what later stages cost it, rollouts
    until 0.9 of a stage's own best score, and switches that were noticed, late, or where none was.

    Each is an ordinary run directory, OUT/TASK1-then-TASK2.../METHOD-seedN. Leaves stream.json and stream.png in OUT.
    The same command goes on where it stopped.

    Try:

        fst lab stream programs/letters:sort-rotate programs/letters:reverse-drop --methods fst,rl --out runs/stream
    """
    with user_errors(AGAIN):
        from fst_optimizer.lab import cells, stream
        from fst_optimizer.lab import methods as by_name
        from fst_optimizer.lab.launch import run_all
        from fst_optimizer.lab.outcome import write_outcome
        from fst_optimizer.lab.plan import Common

        names = by_name.parse_methods(methods)
        if strange := [one for one in names if by_name.plain(one) not in stream.METHODS or by_name.is_sweep(one)]:
            raise UserError(f"--methods has {strange[0]!r}: a stream is run by {', '.join(stream.METHODS)}")
        console, progress = consoles()
        need_extra("lab", "matplotlib", "scipy")
        stream.check_tasks(tasks)
        sizes = Sizes(train_size, val_size, None)
        total = stage_rollouts * len(tasks)
        common = Common(total, tuple(sets or ()), model, sizes, config, reflection_lm)
        numbers, own = cells.parse_seeds(seeds, 1)[0], by_name.by_method(set_method or ())
        todo = stream.stream_jobs(tasks, out, names, numbers, stage_rollouts, common, own)
        stream.check_streams(todo)
        run_all(todo, at_once=jobs, tell=partial(say, progress))
        rows = [row for job in todo for row in stream.measure(job)]
        paths = write_outcome("stream", rows, out, this_command())
        console.print(rich_table("Tasks in sequence, means over stages and runs", *stream.table(rows)))
        for path in paths:
            say(console, f"wrote {path}")
