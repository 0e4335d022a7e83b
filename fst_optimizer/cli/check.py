"""`fst check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fst_optimizer.cli import options
from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors
from fst_optimizer.task_run import RunRequest, Sizes
from fst_optimizer.text import plain

AsJson = Annotated[bool, typer.Option("--json", help="A JSON list of {level, name, text} instead of lines.")]


def check_command(
    task: options.Task,
    run_dir: options.NewRunDir = None,
    model: options.Model = None,
    engine: options.Engine = None,
    url: options.Url = None,
    reflection_lm: options.ReflectionLM = None,
    method: options.Method = None,
    seed: options.Seed = None,
    max_cycles: options.MaxCycles = None,
    auto: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    train_size: options.TrainSize = None,
    val_size: options.ValSize = None,
    test_size: options.TestSize = None,
    as_json: AsJson = False,
) -> None:
    """Say what would keep fst compile, with the same options, from learning. Nothing is written.

    Tries the program on two training examples and the reflection LM with one call, and tells what a run may spend.

    Prints a line a check, `ok`, `warn` or `fail`, its name and what was found. The exit code is 1 where one fails.

    Try:

        fst check programs/letters
        fst check TASK --model Qwen/Qwen3-1.7B --reflection-lm openai/gpt-5.2
        fst check TASK --set budget.max_rollouts=2000 --json
    """
    request = RunRequest(
        task=task,
        run_dir=Path(),
        model=model,
        engine=engine,
        url=url,
        reflection_lm=reflection_lm,
        auto=auto,
        config_file=config,
        flags={"method": method, "seed": seed, "budget.max_cycles": max_cycles},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
    )
    with user_errors("nothing was begun"):
        from fst_optimizer.task_check import check_task

        _, progress = consoles()
        with quiet_libraries(progress):
            findings = check_task(request, run_dir)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in findings], indent=2))
    else:
        typer.echo("\n".join(plain(str(one)) for one in findings))
    if any(one.level == "fail" for one in findings):
        raise typer.Exit(1)
