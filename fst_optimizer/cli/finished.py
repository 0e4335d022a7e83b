"""What is done with a finished run: `fst eval`, `fst serve`, `fst export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fst_optimizer.cli.console import consoles, quiet_libraries, scoring_bar, server_start, user_errors
from fst_optimizer.cli.options import BaseModel, FinishedRunDir, RunDir, ServedName, Task, TestSize, Url
from fst_optimizer.cli.tables import evaluation, served
from fst_optimizer.engines.vllm.server import SERVED_NAME
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import KEY_VARIABLE
from fst_optimizer.progress.tables import show
from fst_optimizer.store.files import RunFiles, read_json, runs_in


def eval_command(
    task: Task,
    run_dir: RunDir = None,
    model: BaseModel = None,
    engine: Annotated[str | None, typer.Option(help="torch or vllm. [default: what the run used]")] = None,
    url: Url = None,
    test_size: TestSize = None,
) -> None:
    """Score a finished run on its task's test set, from the run's files alone.

    Decoding is greedy, as it was at the end of the run: the score is the one that result.json records.

    Try:

        fst eval programs/letters --run-dir runs/first
    """
    with user_errors("start it again to score from the beginning"):
        run_dir = given_folder(task, run_dir)
        from fst_optimizer.finished.score import score_task

        out, progress = consoles()
        with quiet_libraries(progress), scoring_bar(progress) as on_progress:
            score = score_task(
                task, run_dir, test_size=test_size, model=model, engine=engine, url=url, on_progress=on_progress
            )
        show(out, evaluation(task, run_dir, score))


def given_folder(task: str, run_dir: Path | None) -> Path:
    """The folder of a finished run. Raises UserError where none is given, with those of the task."""
    if run_dir is not None:
        return run_dir
    finished = [path for path in runs_in(Path("runs")) if RunFiles(path).result.exists()]
    mine = [str(path) for path in finished if read_json(RunFiles(path).config).get("task") == task]
    there = f"finished runs of {task} are {', '.join(mine[:5])}" if mine else f"runs/ has no finished one of {task}"
    raise UserError(f"--run-dir is missing, the run to score: {there}")


def serve_command(
    run_dir: FinishedRunDir,
    name: ServedName = SERVED_NAME,
    model: BaseModel = None,
    host: Annotated[str, typer.Option(help="What to listen on. Others reach anything but loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="vllm.NAME=VALUE", help="A setting of the server.")
    ] = None,
) -> None:
    """Serve a finished run's policy as an OpenAI-compatible endpoint, until Ctrl-C.

    The server is vLLM. Its key is read from FST_API_KEY; without that, a new one is made and shown.

    Try:

        fst serve runs/first
        fst serve runs/first --port 8001 --set vllm.max_model_len=4096
    """
    with user_errors("the server is stopped"):
        from fst_optimizer.finished.serve import policy_server, server_settings

        out, progress = consoles()
        config, key = server_settings(run_dir, sets or ()), os.environ.get(KEY_VARIABLE)
        server = policy_server(run_dir, model=model, name=name, host=host, port=port, api_key=key, config=config)
        try:
            with server_start(progress) as server.on_wait:
                server.start()
            show(out, [served(server, name, key_given=key is not None)])
            server.wait()
        finally:
            server.stop()


def export_command(
    run_dir: FinishedRunDir,
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model, the adapter merged into the base in float32.")
    ] = False,
    name: ServedName = SERVED_NAME,
    model: BaseModel = None,
) -> None:
    """Write a finished run's program and weights as files that need nothing of this library.

    OUT gets program.json, which dspy loads, and adapter/, which peft and vLLM load, or with --merge model/, which
    transformers and vLLM load; and a README.md that says how.

    Try:

        fst export runs/first --out exported
        fst export runs/first --out merged --merge
    """
    with user_errors("nothing was written; run it again"):
        from fst_optimizer.finished.export import export_run

        console, progress = consoles()
        with quiet_libraries(progress):
            paths = export_run(run_dir, out, merge=merge, model=model, name=name)
        show(console, [f"wrote {path}" for path in paths])
