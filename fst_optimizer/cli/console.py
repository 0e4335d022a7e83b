"""What commands print: results on stdout, progress and errors on stderr, and nothing of other libraries."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from fst_optimizer.errors import FSTError, Paused, ProgramError, UserError
from fst_optimizer.keys import without_secrets, words_without_secrets
from fst_optimizer.progress.tables import say
from fst_optimizer.text import clock, plain

if TYPE_CHECKING:
    from rich.console import Console

    from fst_optimizer.engines.vllm.server import OnWait


@contextmanager
def user_errors(after_interrupt: str) -> Iterator[None]:
    """Mistakes and failures as one line on stderr.

    The exit code is 2 for the user's mistake, 1 for a broken part, 3 for a pause, 130 for Ctrl-C.

    SIGTERM, which is how schedulers end a job, does what Ctrl-C does: servers and runs that were started are stopped.
    """
    try:
        with _sigterm_as_interrupt():
            yield
    except ProgramError as error:  # its text has the traceback's end
        raise _exit(f"failed: {error}", 1) from error
    except UserError as error:
        raise _exit(f"error: {error}", 2) from error
    except Paused as error:
        raise _exit(f"paused: {error}", 3) from error
    except FSTError as error:
        known = str(error.__cause__ or "") in str(error)
        cause = "" if known else f" ({type(error.__cause__).__name__}: {error.__cause__})"
        raise _exit(f"failed: {error}{cause}", 1) from error
    except KeyboardInterrupt as error:
        raise _exit(f"interrupted; {after_interrupt}", 130) from error


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(text: str, code: int) -> typer.Exit:
    typer.echo(plain(without_secrets(text)), err=True)  # of a cause, too
    return typer.Exit(code)


def this_command() -> str:
    """This command line, for people to type again; keys and passwords are left out."""
    return shlex.join(["fst", *words_without_secrets(sys.argv[1:])])


def consoles() -> tuple[Console, Console]:
    """Where results go (stdout) and where progress goes (stderr)."""
    from rich.console import Console

    return Console(), Console(stderr=True)


@contextmanager
def scoring_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Takes how many test examples are scored, and of how many: a bar on a terminal, nothing elsewhere."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring the test set", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def server_start(console: Console) -> Iterator[OnWait]:
    """Shows how a server's start goes: its log's last line on a terminal, a line every ten seconds elsewhere."""
    from rich.markup import escape

    printed_s = 0.0

    def on_wait(waited_s: float, log_line: str) -> None:
        nonlocal printed_s
        text = f"starting vLLM, {clock(waited_s)}: {plain(log_line)[:90]}"
        if console.is_terminal:
            status.update(escape(text))
        elif waited_s - printed_s >= 10:
            printed_s = waited_s
            say(console, text)

    say(console, "starting vLLM, which takes half a minute or more ...")
    with console.status("starting vLLM") as status:  # prints nothing elsewhere than on a terminal
        yield on_wait


@contextmanager
def quiet_libraries(console: Console) -> Iterator[None]:
    """Only this package prints: no loading bars, no warning for each truncated completion. Warnings take one line."""
    from fst_optimizer.model.load import no_bars

    own, handler = logging.getLogger("fst_optimizer"), _OneLine(console)
    with ExitStack() as undo, warnings.catch_warnings():
        for logger in map(logging.getLogger, ("dspy", "transformers", "peft", "LiteLLM")):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        undo.enter_context(no_bars())
        undo.callback(own.removeHandler, handler)
        own.addHandler(handler)
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(console, f"note: {message}")
        yield


class _OneLine(logging.Handler):
    """Log records of this package as single lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "from_python", False):
            return
        say(self.console, f"{record.levelname.lower()}: {without_secrets(record.getMessage())}")
