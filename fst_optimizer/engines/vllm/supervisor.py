"""Runs a command that must not outlive this process's parent: `python supervisor.py COMMAND...`, nothing imported.

The parent holds the other end of standard input. When that closes, however the parent ended (SIGKILL too), or when the
command ends, every process of the command's group is stopped. The command runs in a session of its own, so a
Ctrl-C at the terminal does not reach it: the parent decides. The first line on standard output is its process id.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
_POLL_S = 0.5


def supervise(command: list[str]) -> int:
    """Run the command until it ends or the parent does; returns its exit status."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    parent = os.getppid()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_supervisor
    )
    os.write(1, f"{child.pid}\n".encode())
    while child.poll() is None and not asked and not _abandoned(parent):
        pass
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    # Also where the command ended by itself: what it started may still run.
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _abandoned(parent: int) -> bool:
    """Whether the parent closed its end or is gone; waits up to `_POLL_S` for that."""
    readable, _, _ = select.select([0], [], [], _POLL_S)
    return bool(readable and not os.read(0, 4096)) or os.getppid() != parent


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_supervisor() -> None:
    """In the command's process: have Linux stop it also where the supervisor itself is killed with SIGKILL."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]) & 0xFF)
