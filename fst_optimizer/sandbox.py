"""Calls functions in a helper process, with limits that no thread can have.

Libraries that read what a model wrote may compute for ever on a short text such as `9**9**9`, in one call that holds
Python's lock: the whole run would stand still, and no thread can be stopped. A process can. It also has a fixed hash
seed, so that what is drawn from sets is the same in every run. POSIX only.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
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
            RuntimeError: The function raised something else, or the helper did not start.
        """
        request = json.dumps({"function": function, "cpu_s": cpu_s, "arguments": arguments}).encode()
        with self._lock:
            reply = self._exchange(request)
        if reply is None:
            raise Stopped(f"{function} took more than {cpu_s:g} s of processor time, or too much memory")
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

    def _exchange(self, request: bytes) -> dict[str, Any] | None:
        """The reply to one request; None when the helper ended without one."""
        try:
            if self._process is None:
                self._process = self._start()
            reply = self._ask(self._process, request)
        except BaseException:  # an answer half read would be taken for the next one's
            self.close()
            raise
        if reply is None:
            self.close()
        return reply

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process; the helper ends when its input does
        )
        reply = self._ask(process, None)
        if reply is None or "error" in reply:
            process.kill()
            process.communicate()
            why = "it ended at once" if reply is None else reply["error"]
            raise RuntimeError(f"the helper process of {self.script} did not start: {why}")
        return process

    @staticmethod
    def _ask(process: "subprocess.Popen[bytes]", request: bytes | None) -> dict[str, Any] | None:
        assert process.stdin is not None and process.stdout is not None
        try:
            if request is not None:
                process.stdin.write(request + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


def _serve(script: str) -> None:
    """The helper's side: one reply for each line of standard input, the first one when the script is loaded."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what the libraries print is no reply
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        module = _load(script)
        print(json.dumps({"result": None}), file=replies, flush=True)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=replies, flush=True)
        return
    for line in requests:
        print(_reply(module, json.loads(line)), file=replies, flush=True)


def _load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sandboxed", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reply(module: ModuleType, request: dict[str, Any]) -> str:
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # its signal, with no handler, ends the process
    try:
        return json.dumps({"result": getattr(module, request["function"])(**request["arguments"])})
    except ValueError as error:
        return json.dumps({"mistake": str(error)})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve(sys.argv[1])
