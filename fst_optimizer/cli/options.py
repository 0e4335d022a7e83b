"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

TASK_HELP = (
    "PATH_OR_MODULE[:VARIANT]: a folder with task.py, or a module, that has build_program(), metric() and load(). "
    "Try programs/letters, which comes with its own small model."
)
Task = Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)]
RunDir = Annotated[Path, typer.Option("--run-dir", help="The run's folder.", show_default=False)]
FinishedRunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.", show_default=False)]
BaseModel = Annotated[str | None, typer.Option("--model", help="Where the base model is now. [default: where it was]")]
ServedName = Annotated[str, typer.Option("--name", help="The model name that clients ask for.")]
TrainSize = Annotated[int | None, typer.Option(min=1, help="Use only this many training examples.")]
ValSize = Annotated[int | None, typer.Option(min=1, help="Use only this many validation examples.")]
TestSize = Annotated[int | None, typer.Option(min=1, help="Use only this many test examples.")]


class Auto(StrEnum):
    """The presets."""

    light = "light"
    medium = "medium"
    heavy = "heavy"
