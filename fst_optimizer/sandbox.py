"""Calls functions in a helper process, with limits that no thread can have.

Libraries that read what a model wrote may compute for ever on a short text such as `9**9**9`, in one call that holds
Python's lock: the whole run would stand still, and no thread can be stopped. A process can. It also has a fixed hash
seed, so that what is drawn from sets is the same in every run. POSIX only.

The helper runs this file and imports nothing of the package. It is no `multiprocessing` pool: those import the user's
script again, and an orphan of theirs outlives a parent that is killed. See docs/decisions.md.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 * 2**30
"""Of the helper's address space."""


class Stopped(Exception):
    """The helper was ended in the middle of a call: out of processor time, or of memory."""


class Sandbox:
    """One helper process, started by the first call and again after it was stopped. Threads take turns.

    Args:
        script: A Python file; its functions, which take and return what JSON can hold, are what can be called.
    """

    def __init__(self, script: Path) -> None:
        self.script = script
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def call(self, function: str, *, cpu_s: float, **arguments: Any) -> Any:
        """What the script's function returns.

        Args:
            function: Its name.
            cpu_s: Processor time after which the helper is ended, in seconds.
            **arguments: By name.

        Raises:
            ValueError: The function raised it: the caller's mistake, in words for the user.
            Stopped: The helper was ended.
            RuntimeError: The function raised something else, or the script could not be loaded.
        """
        request = json.dumps({"function": function, "cpu_s": cpu_s, "arguments": arguments}).encode()
        with self._lock:
            line = b""
            try:
                line = self._exchange(request)
            finally:  # also on Ctrl-C: a reply that is read in part would be taken for the next one's
                if not line.endswith(b"\n"):
                    self.close()
        if not line.endswith(b"\n"):
            raise Stopped(f"{function} took more than {cpu_s:g} s of processor time, or too much memory")
        reply = json.loads(line)
        if "mistake" in reply:
            raise ValueError(reply["mistake"])
        if "error" in reply:
            raise RuntimeError(f"{function} in {self.script.name} failed:\n{reply['error']}")
        return reply["result"]

    def close(self) -> None:
        """End the helper; the next call starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, request: bytes) -> bytes:
        """The helper's reply to one line; incomplete if it ended before."""
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-P", __file__, str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process; the helper ends when its input does
        )
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + b"\n")
            process.stdin.flush()
        return process.stdout.readline()


def _serve(script: str) -> None:
    """The helper's side: one reply for each line of standard input."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what the libraries print is no reply
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    functions, broken = {}, None
    try:
        functions = runpy.run_path(script, run_name="sandboxed")
    except Exception:
        broken = json.dumps({"error": traceback.format_exc()})
    for line in requests:
        print(broken or _reply(functions, json.loads(line)), file=replies, flush=True)


def _reply(functions: dict[str, Any], request: dict[str, Any]) -> str:
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # its signal, with no handler, ends the process
    try:
        return json.dumps({"result": functions[request["function"]](**request["arguments"])})
    except ValueError as error:
        return json.dumps({"mistake": str(error)})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve(sys.argv[1])
