"""Writes a task whose policy is told what to say, in whatever process: for tests of `fst tune` and its workers."""

from pathlib import Path

from helpers.tiny_study import SETTINGS

SOURCE = '''
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, {helpers!r})

import fst_optimizer.task_run
from helpers import tiny_study
from fst_optimizer import FSTConfig, Policy
from fst_optimizer.testing import ScriptedEngine

HERE = Path(__file__).parent


def make_policy(choices, plan, *_):
    settings = plan.settings
    return Policy(
        {model!r},
        engine=lambda policy: ScriptedEngine(policy, tiny_study.answer),
        lora=settings.lora,
        seed=settings.config.seed,
    )


fst_optimizer.task_run.make_policy = make_policy


def build_program(variant=None):
    return tiny_study.Program()


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    if (HERE / "hang").exists():
        _hang_once()
    if (HERE / "fail").exists():
        raise ZeroDivisionError("no good")
    return tiny_study.metric(example, prediction)


def _hang_once():
    """The first that comes tells who it is, and is never heard of again."""
    try:
        with (HERE / "hanging").open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    threading.Event().wait()


def load(split, size=None, seed=0, variant=None):
    start = dict(train=0, val=100, test=200)[split]
    return tiny_study.examples(6 if split == "train" else 4, start)


def config(variant=None):
    return FSTConfig.from_dict({settings!r})


def model():
    return {model!r}
'''


def write_task(folder, model):
    """A folder that is a TASK for the command line."""
    folder.mkdir(parents=True)
    helpers = str(Path(__file__).parents[1])
    (folder / "task.py").write_text(SOURCE.format(helpers=helpers, model=str(model), settings=SETTINGS))
    return folder
