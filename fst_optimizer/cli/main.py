"""The `fst` command. Torch, dspy and rich are imported by the commands that use them: `fst --help` is quick."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

import fst_optimizer.cli.experiments
import fst_optimizer.cli.stream  # noqa: F401
from fst_optimizer.children import end_with_parent
from fst_optimizer.cli.check import check_command
from fst_optimizer.cli.compile import compile_command
from fst_optimizer.cli.distill import distill_command
from fst_optimizer.cli.finished import eval_command, export_command, serve_command
from fst_optimizer.cli.lab import lab
from fst_optimizer.cli.tune import tune_command

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


@app.callback()
def fst(
    version: Annotated[
        bool,
        typer.Option("--version", callback=lambda given: _say_version(given), is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Its own options; the help text is the app's."""


def _say_version(given: bool) -> None:
    if given:
        typer.echo(f"fst-optimizer {installed_version('fst-optimizer')}")
        raise typer.Exit


app.command("compile")(compile_command)
app.command("check")(check_command)
app.command("tune")(tune_command)
app.command("eval")(eval_command)
app.command("serve")(serve_command)
app.command("export")(export_command)
app.command("distill")(distill_command)
app.add_typer(lab, name="lab")


def main() -> None:
    """The console script."""
    end_with_parent()
    app()


if __name__ == "__main__":
    main()
