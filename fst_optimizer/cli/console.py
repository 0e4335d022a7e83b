"""How commands speak: results on stdout, progress and mistakes on stderr, and nobody else a word."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from fst_optimizer.errors import FSTError, Paused, UserError
from fst_optimizer.text import clock, plain

if TYPE_CHECKING:
    from rich.console import Console

    from fst_optimizer.config.run import FSTConfig
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
    except UserError as error:
        raise _exit(f"error: {error}", 2) from error
    except Paused as error:
        raise _exit(f"paused: {error}", 3) from error
    except FSTError as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
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
    typer.echo(plain(text), err=True)
    return typer.Exit(code)


def this_command() -> str:
    """This command line, for people to type again; a password in a URL is left out."""
    hidden = [re.sub(r"(://[^:/@\s]+):[^@\s]*@", r"\1:***@", word) for word in sys.argv[1:]]
    return shlex.join(["fst", *hidden])


def consoles() -> tuple[Console, Console]:
    """Where results go (stdout) and where progress goes (stderr)."""
    from rich.console import Console

    return Console(), Console(stderr=True)


@contextmanager
def shown(console: Console, config: FSTConfig) -> Iterator[Any]:
    """The live display of a run, after a word on what takes the first seconds."""
    from fst_optimizer.cli.display import display

    console.print("loading the model ...", markup=False)
    with display(console, config) as callback:
        yield callback


@contextmanager
def counted(console: Console) -> Iterator[Any]:
    """A progress bar for one phase on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("scoring the test set", total=None)
        yield lambda event: bar.update(task, completed=event["done"], total=event["total"])


@contextmanager
def starting(console: Console) -> Iterator[OnWait]:
    """Shows how a server's start goes: its log's last line on a terminal, a line every ten seconds elsewhere."""
    told_s = 0.0

    def tell(waited_s: float, log_line: str) -> None:
        nonlocal told_s
        text = f"starting vLLM, {clock(waited_s)}: {plain(log_line)[:90]}"
        if status:
            status.update(escape(text))
        elif waited_s - told_s >= 10:
            told_s = waited_s
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    from rich.markup import escape

    console.print("starting vLLM, which takes half a minute or more ...", markup=False)
    if not console.is_terminal:
        status = None
        yield tell
        return
    with console.status("starting vLLM") as status:
        yield tell


@contextmanager
def quiet_libraries(console: Console) -> Iterator[None]:
    """Only this package speaks: no loading bars, no warning for each truncated completion. Warnings take one line."""
    silenced = [logging.getLogger(name) for name in ("dspy", "transformers", "peft", "LiteLLM")]
    levels = [logger.level for logger in silenced]
    for logger in silenced:
        logger.setLevel(logging.ERROR)
    handler = _OneLine(console)
    logging.getLogger("fst_optimizer").addHandler(handler)
    try:
        with _without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: handler.tell(f"note: {message}")
            yield
    finally:
        logging.getLogger("fst_optimizer").removeHandler(handler)
        for logger, level in zip(silenced, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging as hub

    on: Any = hub  # its functions carry no types
    shown_before = on.is_progress_bar_enabled()
    on.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            on.enable_progress_bar()


class _OneLine(logging.Handler):
    """Log records of this package as single lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(f"{record.levelname.lower()}: {record.getMessage()}")

    def tell(self, text: str) -> None:
        """Print it; model text may be in it."""
        self.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
