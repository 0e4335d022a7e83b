"""`fst tune` on the tiny task, in this process or in another."""

import json
import subprocess
import sys
import threading
from collections import Counter

import optuna

from fst_optimizer.tuning.storage import open_storage
from helpers.servers import hear_interrupts
from helpers.tiny_study import SPACE
from helpers.tiny_task import write_task

LOOK_S = 0.2


def make_task(folder, model):
    """The tiny task with its search space."""
    folder = write_task(folder, model)
    (folder / "space.json").write_text(json.dumps(SPACE))
    return folder


def options(task, folder, *more):
    return [str(word) for word in ("tune", task, "--dir", folder, "--space", task / "space.json", *more)]


def started(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fst_optimizer.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_interrupts,
    )


def wait_for(path, process, timeout_s=120):
    """The file's text, once it is there; looked for while the process runs."""
    look = threading.Event()
    for _ in range(int(timeout_s / LOOK_S)):
        if path.exists() and path.read_text():
            return path.read_text()
        assert process.poll() is None, process.stdout.read()
        look.wait(LOOK_S)
    raise AssertionError(f"{path} did not come")


def trials_of(url, name):
    study = optuna.load_study(study_name=name, storage=open_storage(url))
    return study.get_trials(deepcopy=False)


def check_killed_study(trials, wanted, killed):
    """As many finished trials as were wanted; the killed one failed, and was tried again with its parameters."""
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] + states["PRUNED"] == wanted
    assert states["FAIL"] == 1 and states["RUNNING"] == states["WAITING"] == 0
    (lost,) = [trial for trial in trials if trial.state.name == "FAIL"]
    assert lost.number == killed and "cause" not in lost.user_attrs
    (again,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == killed]
    assert again.params == lost.params and again.state.name in ("COMPLETE", "PRUNED")
    assert len(trials) == wanted + 1
    assert not [key for key in again.system_attrs if key.startswith("completed_rung")] or again.intermediate_values
