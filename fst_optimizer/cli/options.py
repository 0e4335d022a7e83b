"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TASK_HELP = (
    "PATH_OR_MODULE[:VARIANT]: a folder with task.py, or a module, that has build_program(), metric() and load(). "
    "Try programs/letters, which comes with its own small model."
)
Task = Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="The finished run's folder.", show_default=False)]
NewRunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="The run's folder. [default: runs/TASK-VARIANT-DATE-TIME]", show_default=False),
]
ReflectionLM = Annotated[
    str | None,
    typer.Option(
        "--reflection-lm",
        metavar="NAME",
        help="The LM that writes new instructions: a name that litellm knows, like openai/gpt-5.2, its key from the "
        "environment alone. policy: the policy's own base. extractive: no LM, but recurring sentences of the feedback. "
        "[default: the task's own, or extractive]",
    ),
]
Instructions = Annotated[
    Path | None,
    typer.Option(
        "--instructions",
        metavar="FILE.json",
        help="What the program starts from instead of its own instructions: {predictor: text}. With --method once and "
        "--set fast.once_rollouts=0 the weights are trained under just these. [default: the program's own]",
        show_default=False,
    ),
]
FinishedRunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's folder.", show_default=False)]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", help="Where the base model is now. [default: the run's own by its name, or the task's]"),
]
ServedName = Annotated[str, typer.Option("--name", help="The model name that clients ask for.")]
Model = Annotated[
    str | None,
    typer.Option(help="A model's folder, a hub name like Qwen/Qwen3-1.7B, or letters. [default: the task's own]"),
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="What generates. torch: this process. vllm: a vLLM server, started and stopped by this command, or "
        "the one at --url. [default: torch, or the run's own with --resume]"
    ),
]
Url = Annotated[
    str | None,
    typer.Option(help="With --engine vllm: a server that runs already. Its key is read from FST_API_KEY."),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="fst: prompts and weights, in turns. rl: weights alone, from the seed prompt. gepa: prompts alone. "
        "sequential: half of the rollouts on gepa, then rl; needs --set budget.max_rollouts=N. "
        "once: fast.once_rollouts rollouts on gepa, or none, then rl. "
        "[default: the task's, or fst]"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Every random choice follows from it. [default: 0]")]
MaxCycles = Annotated[int | None, typer.Option(help="Cycles of a fast round and some slow steps.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A JSON file of nested settings.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting; may be repeated.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run, with its settings.")]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Resume although settings, data, model or libraries are others.")
]
ModelAsCompile = Annotated[str | None, typer.Option(help="As for fst compile. [default: the task's own]")]
TrainSize = Annotated[int | None, typer.Option(min=1, help="Use only this many training examples.")]
ValSize = Annotated[int | None, typer.Option(min=1, help="Use only this many validation examples.")]
TestSize = Annotated[int | None, typer.Option(min=1, help="Use only this many test examples.")]


StartFrom = Annotated[
    Path | None,
    typer.Option(
        "--start-from",
        metavar="RUN_DIR",
        help="Begin with the weights of this finished run, of any task on the same base model, with a fresh optimizer "
        "and the task's own instructions. [default: the base's weights]",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--auto",
        metavar="PRESET",
        help="light, medium, heavy or paper (what the Fast-Slow Training paper used, about 85,000 rollouts), under all "
        "other settings, the task's own too. [default: light]",
    ),
]
