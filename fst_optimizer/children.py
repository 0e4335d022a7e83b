"""Processes that work for this one, and must not outlive it.

A child holds the reading end of a pipe whose writing end its parent alone has. When that closes, however the parent
ended (SIGKILL too), the child gets SIGTERM, which the commands take as Ctrl-C: a run ends in order, and its next start
goes on. POSIX only; elsewhere a child is like any other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

VARIABLE = "FST_PARENT_PIPE"
"""The environment variable with the number of the pipe's reading end."""
GRACE_S = 20.0
"""From SIGTERM to SIGKILL, which costs no more than what was in flight."""


def start_child(command: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that calls `end_with_parent`; `options` are more for `Popen`. Keep what is returned."""
    if os.name != "posix":
        return subprocess.Popen(command, env=env, **options)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(command, env={**env, VARIABLE: str(reading)}, pass_fds=(reading,), **options)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    weakref.finalize(process, os.close, writing)
    return process


def end_with_parent() -> None:
    """In the child, before anything else: from now on it ends when its parent does. Elsewhere nothing happens."""
    number = os.environ.pop(VARIABLE, "")
    if number.isdecimal():
        threading.Thread(target=_watch, args=(int(number),), name="fst-parent", daemon=True).start()


def _watch(pipe: int) -> None:
    with suppress(OSError):
        os.set_inheritable(pipe, False)
        os.read(pipe, 1)  # nothing is ever written there
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)
