"""Where this package's warnings go: to stderr unless the program says otherwise, and into the run's result."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fst_optimizer.keys import without_secrets
from fst_optimizer.text import plain

PACKAGE = logging.getLogger("fst_optimizer")


FROM_PYTHON = {"from_python": True}
"""`extra` of a record that is for Python programs: the commands have a line of their own."""
NOISY = ("dspy.clients.lm", "LiteLLM")
"""Loggers that tell of every truncated completion or request: rollouts' outcomes count them."""


class KeptWarnings(logging.Handler):
    """The texts of all warnings while a run goes on, each once.

    Alarms of monitors are left out: a run's state has them.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one, without the keys that an error's text may hold."""
        if not record.getMessage().startswith("monitor "):
            self.texts.setdefault(without_secrets(record.getMessage()))


class StderrByDefault(logging.Handler):
    """Warnings as lines on stderr, until the program gives the root logger or this package's a handler of its own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Print one, unless another handler will."""
        others = [*logging.getLogger().handlers, *PACKAGE.handlers]
        if all(isinstance(one, StderrByDefault | KeptWarnings | logging.NullHandler) for one in others):
            sys.stderr.write(
                f"fst_optimizer: {record.levelname.lower()}: {plain(without_secrets(record.getMessage()))}\n"
            )


def show_warnings() -> None:
    """Let warnings reach stderr. Done once, when the package is imported."""
    if not any(isinstance(one, StderrByDefault) for one in PACKAGE.handlers):
        PACKAGE.addHandler(StderrByDefault())


@contextmanager
def kept_warnings() -> Iterator[KeptWarnings]:
    """What is warned of inside, while `NOISY` libraries tell of errors alone."""
    kept = KeptWarnings()
    PACKAGE.addHandler(kept)
    try:
        with errors_alone(*NOISY):
            yield kept
    finally:
        PACKAGE.removeHandler(kept)


@contextmanager
def errors_alone(*names: str) -> Iterator[None]:
    """These loggers tell of errors alone, but for those whose level the program has set itself."""
    unset = [one for one in map(logging.getLogger, names) if one.level == logging.NOTSET]
    for one in unset:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one in unset:
            one.setLevel(logging.NOTSET)
