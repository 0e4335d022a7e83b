"""Children end with their parent, however it ends; real processes, and no part of the package replaced."""

import os
import signal
import subprocess
import sys

import psutil

CHILD = """
import signal, sys, time
from fst_optimizer.children import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", flush=True), {ends}))
end_with_parent()
print("runs", flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
from fst_optimizer import children
children.GRACE_S = 0.5
child = children.start_child([sys.executable, "-c", {child!r}], dict(os.environ))
print(child.pid, flush=True)
{then}
"""


def family(then="time.sleep(600)", ends="sys.exit(3)"):
    """A parent and its child: two processes, the second by its id. Both write to one pipe."""
    child = "import fst_optimizer.children as c; c.GRACE_S = 0.5" + CHILD.format(ends=ends)
    script = PARENT.format(child=child, then=then)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    return parent, psutil.Process(int(parent.stdout.readline()))


def test_a_child_is_asked_to_end_when_its_parent_is_killed():
    parent, child = family()
    assert parent.stdout.readline() == "runs\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.stdout.readline() == "asked to end\n"
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    parent.wait()


def test_a_child_that_does_not_end_is_killed():
    parent, _ = family(ends="None")
    assert parent.stdout.readline() == "runs\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.stdout.readline() == "asked to end\n"
    assert parent.stdout.read() == ""  # returns once nobody holds the pipe: both are gone
    parent.wait()


def test_a_child_of_a_parent_that_ends_by_itself_ends_too():
    parent, _ = family(then="")
    assert parent.stdout.read().splitlines()[-1] == "asked to end"
    assert parent.wait() == 0


def test_nobody_watches_where_nobody_asked_and_no_child_inherits_the_number(monkeypatch):
    script = "from fst_optimizer.children import VARIABLE, end_with_parent; import os, threading; end_with_parent(); "
    script += "print(threading.active_count(), VARIABLE in os.environ)"
    for value, said in ((None, "1 False"), ("", "1 False"), ("no number", "1 False")):
        environment = {**os.environ, **({} if value is None else {"FST_PARENT_PIPE": value})}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == said
