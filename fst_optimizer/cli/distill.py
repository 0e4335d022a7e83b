"""`fst distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fst_optimizer.cli import options
from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors
from fst_optimizer.cli.tables import distilled
from fst_optimizer.progress.tables import show
from fst_optimizer.task_run import Sizes
from fst_optimizer.tasks import shipped_task

Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The new run's folder, as --run-dir elsewhere.", show_default=False)
]
Task = Annotated[
    str | None, typer.Option("--task", help="The task that RUN_DIR is of. [default: its own, where that is shipped]")
]
Short = Annotated[
    Path | None,
    typer.Option(
        "--instructions",
        metavar="FILE.json",
        help="Instructions for the student: {predictor: text}. [default: those that RUN_DIR started from]",
        show_default=False,
    ),
]
Engine = Annotated[str | None, typer.Option(help="torch or vllm. [default: what the run used]")]


def distill_command(
    run_dir: options.FinishedRunDir,
    out: Out,
    task: Task = None,
    instructions: Short = None,
    model: options.BaseModel = None,
    engine: Engine = None,
    url: options.Url = None,
    seed: options.Seed = None,
    max_cycles: Annotated[int | None, typer.Option(help="Cycles of some steps and a validation. [default: 10]")] = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    resume: options.Resume = False,
    allow_changes: options.AllowChanges = False,
    train_size: options.TrainSize = None,
    val_size: options.ValSize = None,
    test_size: options.TestSize = None,
) -> None:
    """Teach a finished run's policy to do without its long prompt, which goes into the weights.

    The teacher is the run's best pair. The student has the same weights and the instructions that the run started
    from; it learns from the teacher at its own tokens, until it scores as well on the validation set or the cycles
    are over. DIR is a run like any other. RUN_DIR is only read.

    Where too little of the gain is kept (--set distill.keep_gain=0.9) or the entropy collapses
    (--set distill.min_entropy=0.5), nothing is made, both scores are said, and the exit code is 1. DIR can then be
    resumed with more cycles, or with a lower bar.

    Settings are the run's own, but for the budget, under --config, the options here and --set.

    Try:

        fst distill runs/first --out runs/short
        fst distill runs/first --out runs/short --instructions short.json
        fst distill runs/first --out runs/short --resume --set distill.keep_gain=0.8
    """
    from fst_optimizer.task_distill import DistillRequest, distill_run

    request = DistillRequest(
        run_dir=run_dir,
        out=out,
        task=task,
        model=model,
        engine=engine,
        url=url,
        instructions=instructions,
        config_file=config,
        flags={"seed": seed, "budget.max_cycles": max_cycles},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
        resume=resume,
        allow_changes=allow_changes,
    )
    with user_errors(f"go on with: fst distill {run_dir} --out {out} --resume"):
        from fst_optimizer.progress.display import shown

        console, progress = consoles()
        with quiet_libraries(progress), shown(console=progress) as display:
            display.say(f"run directory: {out}")
            display.say("loading the model ...")
            result = distill_run(request, (display,)).result
        named = None if shipped_task(result["task"]) else result["task"]
        show(console, distilled(result, out, task=named, model=model))
