"""The `fst` command. Torch, dspy and rich are imported by the commands that use them: `fst --help` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fst_optimizer.cli.console import consoles, counted, quiet_libraries, shown, starting, user_errors
from fst_optimizer.cli.lab import lab
from fst_optimizer.cli.options import TASK_HELP, Auto, TestSize, TrainSize, ValSize
from fst_optimizer.cli.tables import closing, evaluation, served, show
from fst_optimizer.cli.tune import tune_command
from fst_optimizer.engines.vllm.server import SERVED_NAME
from fst_optimizer.finished.load import KEY_VARIABLE
from fst_optimizer.task_run import Choices, Sizes, compile_task, eval_task, plan_run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Fast-Slow Training for DSPy programs: evolved prompts and LoRA weights, learned together.

    Start here, without GPU or API key:

        fst compile programs/letters --run-dir runs/first

        fst eval programs/letters --run-dir runs/first
    """,
)
app.add_typer(lab, name="lab")


RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.", show_default=False)]
WhereModel = Annotated[str | None, typer.Option("--model", help="Where the base model is now. [default: where it was]")]
Name = Annotated[str, typer.Option(help="The model name that clients ask for.")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="The run's folder.", show_default=False)]


@app.command("compile")
def compile_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)],
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
    flags = {"method": method, "seed": seed, "budget.max_cycles": max_cycles}
    choices = Choices(
        task=task,
        run_dir=run_dir,
        model=model,
        engine=engine,
        url=url,
        auto=auto.value if auto else None,
        config_file=config,
        flags={name: value for name, value in flags.items() if value is not None},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
        resume=resume,
        allow_changes=allow_changes,
    )
    with user_errors(f"go on with: fst compile {task} --run-dir {run_dir} --resume"):
        out, progress = consoles()
        plan = plan_run(choices)
        with quiet_libraries(progress), shown(progress, plan.settings.config) as callback:
            outcome = compile_task(choices, plan, (callback,))
        show(out, closing(outcome.result, run_dir))


app.command("tune")(tune_command)


@app.command("eval")
def eval_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)],
    run_dir: RunDir,
    model: WhereModel = None,
    engine: Annotated[str | None, typer.Option(help="torch or vllm. [default: what the run used]")] = None,
    test_size: TestSize = None,
) -> None:
    """Score a finished run on its task's test set, from the run's files alone.

    Decoding is greedy, as it was at the end of the run: the score is the one that result.json records.

    Example:
        fst eval programs/letters --run-dir runs/first
    """
    with user_errors("start it again to score from the beginning"):
        out, progress = consoles()
        with quiet_libraries(progress), counted(progress) as callback:
            score = eval_task(task, run_dir, test_size=test_size, model=model, engine=engine, on_progress=callback)
        show(out, evaluation(task, run_dir, score))


@app.command("serve")
def serve_command(
    run_dir: RunFolder,
    name: Name = SERVED_NAME,
    model: WhereModel = None,
    host: Annotated[str, typer.Option(help="What to listen on. Others reach anything but loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="vllm.NAME=VALUE", help="A setting of the server.")
    ] = None,
) -> None:
    """Serve a finished run's policy as an OpenAI-compatible endpoint, until Ctrl-C.

    The server is vLLM. Its key is read from FST_API_KEY; without that, a new one is made and shown.

    Examples:
        fst serve runs/first

        fst serve runs/first --port 8001 --set vllm.max_model_len=4096
    """
    with user_errors("the server is stopped"):
        from fst_optimizer.finished.serve import policy_server, server_settings

        out, progress = consoles()
        config, key = server_settings(run_dir, sets or ()), os.environ.get(KEY_VARIABLE)
        server = policy_server(run_dir, model=model, name=name, host=host, port=port, api_key=key, config=config)
        try:
            with starting(progress) as server.on_wait:
                server.start()
            show(out, [served(server, name, key_given=key is not None)])
            server.wait()
        finally:
            server.stop()


@app.command("export")
def export_command(
    run_dir: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model, the adapter merged into the base in float32.")
    ] = False,
    name: Name = SERVED_NAME,
    model: WhereModel = None,
) -> None:
    """Write a finished run's program and weights as files that need nothing of this library.

    OUT gets program.json, which dspy loads, and adapter/, which peft and vLLM load, or with --merge model/, which
    transformers and vLLM load; and a README.md that says how.

    Examples:
        fst export runs/first --out exported

        fst export runs/first --out merged --merge
    """
    with user_errors("nothing was written; run it again"):
        from fst_optimizer.finished.export import export_run

        console, progress = consoles()
        with quiet_libraries(progress):
            paths = export_run(run_dir, out, merge=merge, model=model, name=name)
        show(console, [f"wrote {path}" for path in paths])


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
