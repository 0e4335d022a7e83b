"""Displays of a run: live in a terminal, one output that is updated in a notebook, plain lines elsewhere.

Each is a callback of a run. A display that fails is switched off; it never ends a run.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from fst_optimizer.progress.snapshot import Event, Snapshot, advance
from fst_optimizer.progress.tables import closing, show
from fst_optimizer.progress.words import lines_of, panel
from fst_optimizer.text import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

logger = logging.getLogger(__name__)

WIDTH = 100
"""Of tables where there is no terminal."""
NOTEBOOK_LINES = 200
"""The last lines that a notebook keeps."""
NOTEBOOK_REFRESH_S = 0.5


class Display:
    """Turns events into lines. This one writes them to stderr, wherever that goes at the moment."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._last_line_s = 0.0
        self._received = time.monotonic()

    @property
    def now_s(self) -> float:
        """The run's clock: that of the last event, and what has passed since."""
        return self.snapshot.time_s + time.monotonic() - self._received

    def open(self) -> None:
        """Begin."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        before, self.snapshot = self.snapshot, advance(self.snapshot, event)
        self._received = time.monotonic()
        for line in lines_of(event, before, self.snapshot, self._last_line_s):
            self._last_line_s = self.snapshot.time_s
            self.write(line)

    def write(self, line: str) -> None:
        """Show a line for good."""
        sys.stderr.write(f"{plain(line)}\n")
        sys.stderr.flush()

    def conclude(self, result: Mapping[str, Any], next_steps: str) -> None:
        """Show what the run came to."""
        self.close()
        sys.stderr.write(_closing_text(result, next_steps))
        sys.stderr.flush()


class TerminalDisplay(Display):
    """Lines that scroll, and under them the latest numbers."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        super().__init__()
        self.console = console
        self._live = Live(
            console=console,
            transient=True,
            refresh_per_second=4,
            get_renderable=self.render,
            # What a program prints goes above the display where both go to the terminal, and where it went elsewhere.
            redirect_stdout=sys.stdout.isatty(),
        )

    def open(self) -> None:
        """Begin to draw, in a thread of rich."""
        self._live.start()

    def close(self) -> None:
        """Stop, and give the cursor back."""
        self._live.stop()

    def write(self, line: str) -> None:
        """Print a line above the numbers; what a new instruction adds and drops has colours."""
        from rich.text import Text

        text = Text(plain(line))
        if line.startswith("    "):
            text.highlight_regex(r"\{\+.*?\+\}", "green")
            text.highlight_regex(r"\[-.*?-\]", "red")
        self.console.print(text, soft_wrap=True)

    def conclude(self, result: Mapping[str, Any], next_steps: str) -> None:
        """Show what the run came to, in place of the numbers."""
        self.close()
        show(self.console, closing(result, next_steps))

    def render(self) -> Text | str:
        """The numbers; rich asks for them a few times a second, and must not be failed."""
        from rich.text import Text

        try:
            return Text(plain("\n".join(panel(self.snapshot, self.now_s))))
        except Exception:
            logger.debug("the display cannot be drawn", exc_info=True)
            return ""


class NotebookDisplay(Display):
    """One output of the cell, rewritten as the run goes: the last lines, and the latest numbers below them."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._handle: Any = None
        self._drawn = 0.0

    def open(self) -> None:
        """Make the output. Everything is drawn from the thread that runs the cell, or it would go to another one."""
        display = importlib.import_module("IPython.display").display  # a notebook has it; it is no requirement
        self._handle = display(_both(""), raw=True, display_id=True)

    def __call__(self, event: Event) -> None:
        """Take one event, and draw anew when the last time was a while ago."""
        super().__call__(event)
        if time.monotonic() - self._drawn >= NOTEBOOK_REFRESH_S:
            self._draw(panel(self.snapshot, self.now_s))

    def write(self, line: str) -> None:
        """Keep a line; drawn with the next event."""
        self._lines = [*self._lines, plain(line)][-NOTEBOOK_LINES:]

    def close(self) -> None:
        """Leave the lines alone."""
        self._draw([])

    def conclude(self, result: Mapping[str, Any], next_steps: str) -> None:
        """Show what the run came to, below the lines."""
        self._lines.append(_closing_text(result, next_steps))
        self._draw([])

    def _draw(self, numbers: list[str]) -> None:
        self._drawn = time.monotonic()
        self._handle.update(_both("\n".join([*self._lines, *([""] * bool(numbers)), *map(plain, numbers)])), raw=True)


class Silent(Display):
    """Shows nothing."""

    def __call__(self, event: Event) -> None:
        """Nothing."""

    def write(self, line: str) -> None:
        """Nothing."""

    def conclude(self, result: Mapping[str, Any], next_steps: str) -> None:
        """Nothing."""


class Guarded:
    """A display that may fail: it is then switched off, with one warning, and the run goes on."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def open(self) -> None:
        """Begin; where this display cannot, with plain lines."""
        try:
            self.display.open()
        except Exception as error:
            logger.debug("no live display: %s", error)
            self.display = Display()

    def say(self, line: str) -> None:
        """Show a line that no event has."""
        self._safely(lambda: self.display.write(line))

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self._safely(lambda: self.display(event))

    def conclude(self, result: Mapping[str, Any], next_steps: str) -> None:
        """Show what the run came to."""
        self._safely(lambda: self.display.conclude(result, next_steps))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._safely(self.display.close)

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            failed, self.display = self.display, Silent()
            try:
                failed.close()
            except Exception:
                logger.debug("the display cannot be closed", exc_info=True)
            logger.warning("the display of progress failed and is off (%s: %s)", type(error).__name__, error)


@contextmanager
def shown(progress: bool = True, console: Console | None = None) -> Iterator[Guarded]:
    """A display that is open inside; silent without `progress`. `console`: None, a new one on stderr."""
    display = Guarded(_chosen(console) if progress else Silent())
    display.open()
    try:
        yield display
    finally:
        display.close()


def _chosen(console: Console | None) -> Display:
    """The display for where stderr goes."""
    from rich.console import Console
    from rich.file_proxy import FileProxy

    console = console or Console(stderr=True)
    if console.is_jupyter:
        return NotebookDisplay()
    # FORCE_COLOR makes rich take a log file for a terminal; and where another live display has taken stderr, two would
    # draw over each other.
    taken = any(isinstance(stream, FileProxy) for stream in (sys.stdout, sys.stderr))
    if taken or not console.is_terminal or console.is_dumb_terminal or not console.file.isatty():
        return Display()
    return TerminalDisplay(console)


def _closing_text(result: Mapping[str, Any], next_steps: str) -> str:
    from rich.console import Console

    out = StringIO()
    show(Console(file=out, width=WIDTH, force_jupyter=False, force_terminal=False), closing(result, next_steps))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _both(text: str) -> dict[str, str]:
    """The same for every kind of front end."""
    return {"text/plain": text, "text/html": f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'}
