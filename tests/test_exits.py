"""What ends Python elsewhere (`sys.exit`, an interrupt, a cancelled task) ends one rollout, or names the metric.

A run that ended with such a code would be a success to a scheduler.
"""

import asyncio
import signal
import sys
import threading
import time

import dspy
import pytest

from fst_optimizer import ProgramError, UserError
from fst_optimizer.errors import MetricError
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.store.files import read_json
from fst_optimizer.tasks import load_task
from fst_optimizer.types import Item
from helpers.toy import SHORT, TRAIN, VAL, Program, answer, metric, optimizer

ENDS = {
    "sys.exit(0)": (lambda: sys.exit(0), "SystemExit: it called sys.exit(0)"),
    "sys.exit()": (lambda: sys.exit(), "SystemExit: it called sys.exit(None)"),
    "argparse": (lambda: sys.exit("usage:\nno option"), r"SystemExit: it called sys.exit('usage:\nno option')"),
    "an interrupt": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "a closed generator": (lambda: _raise(GeneratorExit()), "GeneratorExit"),
    "a cancelled task": (lambda: _raise(asyncio.CancelledError()), "CancelledError"),
    "another one": (lambda: _raise(type("Stop", (BaseException,), {})("now")), "Stop: now"),
}


def _raise(error):
    raise error


def program_of(policy, forward):
    student = type("Ending", (Program,), {"forward": forward})()
    student.set_lm(policy.lm)
    return student


def run_of(policy, run_dir, forward=Program.forward, *, metric=metric, **options):
    fst = optimizer(run_dir, settings=SHORT, metric=metric, **options)
    compiled = fst.compile(program_of(policy, forward), trainset=TRAIN, valset=VAL)
    return compiled.detailed_results.result


@pytest.mark.parametrize("name", ["sys.exit(0)", "an interrupt", "a cancelled task"])
def test_a_program_that_ends_python_in_some_rollouts_has_program_errors(scripted, tmp_path, name):
    end, text = ENDS[name]

    def forward(self, question):
        if int(question[1:]) % 2:
            end()
        return Program.forward(self, question)

    result = run_of(scripted(answer), tmp_path / "run", forward)
    assert result["ended"] == "done"
    assert result["outcomes"]["program_error"] > 0 and result["outcomes"]["ok"] > 0
    assert (result["first_error"]["outcome"], result["first_error"]["text"]) == ("program_error", text)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_program_that_ends_python_in_all_rollouts_is_a_program_error(scripted, tmp_path, name, dry_run):
    end, text = ENDS[name]
    with pytest.raises(ProgramError) as caught:
        run_of(scripted(answer), tmp_path / "run", lambda self, question: end(), values={"run.dry_run": dry_run})
    assert text.splitlines()[0] in str(caught.value)
    assert "test_exits.py" in str(caught.value), "the place is told"
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_metric_that_ends_python_is_named_with_the_example(scripted, tmp_path, name, dry_run):
    end, _ = ENDS[name]

    def leaving(example, prediction, trace=None, pred_name=None, pred_trace=None):
        end()

    with pytest.raises(MetricError, match=r"metric leaving raised on example (train|val)-\d+: ") as caught:
        run_of(scripted(answer), tmp_path / "run", metric=leaving, values={"run.dry_run": dry_run})
    assert ("it called sys.exit(" in str(caught.value)) == (isinstance(caught.value.__cause__, SystemExit))


def test_a_program_of_coroutines_that_exits_has_a_program_error(scripted, tmp_path):
    async def leaves():
        sys.exit(3)

    with pytest.raises(ProgramError, match=r"it called sys.exit\(3\)"):
        run_of(scripted(answer), tmp_path / "run", lambda self, question: asyncio.run(leaves()))


def test_a_tool_that_exits_has_a_program_error(scripted, tmp_path):
    def forward(self, question):
        pairs = [(dspy.Tool(lambda x: sys.exit(4), name="leave"), {"x": "1"})] * 2
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)

    with pytest.raises(ProgramError, match=r"it called sys.exit\(4\)"):
        run_of(scripted(answer), tmp_path / "run", forward)


def test_a_true_ctrl_c_is_still_one(scripted, tmp_path):
    def forward(self, question):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        return Program.forward(self, question)

    with pytest.raises(KeyboardInterrupt):
        run_of(scripted(answer), tmp_path / "run", forward, values={"run.grace_s": 0.0})
    assert read_json(tmp_path / "run" / "config.json")


def test_in_the_main_thread_a_metric_is_interrupted():
    def interrupted(example, prediction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Metric(interrupted).judge(Item("train-0", TRAIN[0]), None)


def test_a_callback_may_end_the_script_and_the_run_is_resumed(scripted, tmp_path):
    def leave(data):
        if data["kind"] == "fast":
            sys.exit(5)

    with pytest.raises(SystemExit):
        run_of(scripted(answer), tmp_path / "run", callbacks=[leave])
    assert run_of(scripted(answer), tmp_path / "run", resume=True)["ended"] == "done"


TASK = """
import sys
{imported}
def build_program(): {build}
def metric(example, prediction): return 1.0
def load(split): return []
"""


@pytest.mark.parametrize(
    ("imported", "build", "named"),
    [
        ("sys.exit(0)", "pass", r"importing it called sys.exit\(0\)"),
        ("", "sys.exit()", "build_program called sys.exit"),
    ],
)
def test_a_task_that_exits_is_refused(tmp_path, imported, build, named):
    folder = tmp_path / "leaving"
    folder.mkdir()
    (folder / "task.py").write_text(TASK.format(imported=imported, build=build))
    with pytest.raises(UserError, match=rf"task '.*leaving': {named}.*__main__"):
        load_task(str(folder)).build_program()
