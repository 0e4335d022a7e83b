"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

TASK_HELP = (
    "PATH_OR_MODULE[:VARIANT]: a folder with task.py, or a module, that has build_program(), metric() and load(). "
    "Try programs/letters, which comes with its own small model."
)
TrainSize = Annotated[int | None, typer.Option(min=1, help="Use only this many training examples.")]
ValSize = Annotated[int | None, typer.Option(min=1, help="Use only this many validation examples.")]
TestSize = Annotated[int | None, typer.Option(min=1, help="Use only this many test examples.")]


class Auto(StrEnum):
    """The presets."""

    light = "light"
    medium = "medium"
    heavy = "heavy"
