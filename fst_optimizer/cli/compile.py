"""`fst compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors
from fst_optimizer.cli.options import Auto, RunDir, Task, TestSize, TrainSize, ValSize
from fst_optimizer.cli.tables import closing, show
from fst_optimizer.task_run import RunRequest, Sizes, compile_task, plan_run


def compile_command(
    task: Task,
    run_dir: RunDir,
    model: Annotated[
        str | None, typer.Option(help="A model's folder, or a hub name like Qwen/Qwen3-1.7B. [default: the task's own]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What generates. torch: this process. vllm: a vLLM server, started and stopped by this command, or "
            "the one at --url. [default: torch, or the run's own with --resume]"
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="With --engine vllm: a server that runs already. Its key is read from FST_API_KEY."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="fst: prompts and weights, in turns. rl: weights alone, from the seed prompt. gepa: prompts alone. "
            "sequential: half of the rollouts on gepa, then rl; needs --set budget.max_rollouts=N. "
            "[default: the task's, or fst]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Every random choice follows from it. [default: 0]")] = None,
    max_cycles: Annotated[int | None, typer.Option(help="Cycles of a fast round and some slow steps.")] = None,
    auto: Annotated[Auto | None, typer.Option(help="A preset under all other settings. [default: light]")] = None,
    config: Annotated[Path | None, typer.Option(help="A JSON file of nested settings.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run, with its settings.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although settings, data, model or libraries are others.")
    ] = False,
    train_size: TrainSize = None,
    val_size: ValSize = None,
    test_size: TestSize = None,
) -> None:
    """Learn a task's prompts and weights together, and score it on its test set.

    The run's folder ends up with the program, its policy version, every number on the way and a result.json.
    Settings are laid over each other in this order: the preset, the task's own, --config, the options here, --set.

    Examples:
        fst compile programs/letters --run-dir runs/first

        fst compile programs/letters:sort-rotate --run-dir runs/rl --method rl --seed 1

        fst compile programs/letters --run-dir runs/slow --set train.lr=5e-4 --set rollout.batch_size=16

        fst compile programs/letters --run-dir runs/first --resume

        fst compile TASK --run-dir runs/big --model Qwen/Qwen3-8B --engine vllm --set vllm.gpu_memory_utilization=0.4
    """
    request = RunRequest(
        task=task,
        run_dir=run_dir,
        model=model,
        engine=engine,
        url=url,
        auto=auto,
        config_file=config,
        flags={"method": method, "seed": seed, "budget.max_cycles": max_cycles},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
        resume=resume,
        allow_changes=allow_changes,
    )
    with user_errors(f"go on with: fst compile {task} --run-dir {run_dir} --resume"):
        from fst_optimizer.cli.display import run_display

        out, progress = consoles()
        plan = plan_run(request)
        with quiet_libraries(progress), run_display(progress, plan.settings.config) as callback:
            outcome = compile_task(request, plan, (callback,))
        show(out, closing(outcome.result, run_dir))
