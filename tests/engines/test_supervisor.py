"""The supervisor, with commands that stand for a server."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from fst_optimizer.engines.vllm import supervisor
from helpers.servers import group

FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
"""A command that starts another process."""


def supervised(*command, **settings):
    """A supervisor with its command, and the command's process id."""
    process = subprocess.Popen(
        [sys.executable, supervisor.__file__, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **settings
    )
    return process, int(process.stdout.readline())


def gone(pid):
    """Wait until no process of the group is left."""
    psutil.wait_procs(group(pid), timeout=30)
    return not group(pid)


def test_closing_its_input_stops_the_command_and_what_that_started():
    process, pid = supervised(sys.executable, "-c", FAMILY + "time.sleep(600)")
    process.stdin.close()
    process.wait(30)
    assert gone(pid)


def test_a_command_that_ends_takes_its_children_along_and_its_status_is_told():
    process, pid = supervised(sys.executable, "-c", FAMILY + "sys.exit(7)")
    assert process.wait(30) == 7
    assert gone(pid)


def test_a_command_that_ignores_sigterm_is_killed():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(supervisor.__file__)!r}); import supervisor; "
        "supervisor.GRACE_S = 0.2; "
    )
    script += "supervisor.supervise(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pid = int(process.stdout.readline())
    process.stdin.close()
    process.wait(30)
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_stops_the_command(number):
    process, pid = supervised(sys.executable, "-c", "import time; time.sleep(600)")
    process.send_signal(number)
    process.wait(30)
    assert gone(pid)


def test_a_parent_killed_with_sigkill_leaves_nothing_behind():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"k = subprocess.Popen([sys.executable, {supervisor.__file__!r}, sys.executable, '-c', "
            "'import time; time.sleep(600)'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
            "print(int(k.stdout.readline()), flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    pid = int(parent.stdout.readline())
    assert group(pid)
    parent.kill()
    parent.wait()
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_supervisor_killed_with_sigkill_takes_the_command_along():
    process, pid = supervised(sys.executable, "-c", "import time; time.sleep(600)")
    process.kill()
    process.wait()
    assert gone(pid)
