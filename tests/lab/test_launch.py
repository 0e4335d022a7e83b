"""`fst lab compare` as a process: killed, and started again."""

import signal

import psutil
import pytest

from fst_optimizer.store.files import RunFiles, in_use, read_json
from helpers.run_check import assert_as_designed
from helpers.tiny_task import write_task
from helpers.tune import started, wait_for

pytestmark = pytest.mark.slow


def test_a_comparison_that_is_killed_takes_its_run_with_it_and_the_same_command_goes_on(tmp_path, tiny_model):
    pytest.importorskip("matplotlib")
    task, out = write_task(tmp_path / "tiny", tiny_model), tmp_path / "out"
    command = ["lab", "compare", str(task), "--out", str(out), "--methods", "gepa,rl", "--seeds", "0"]
    command += ["--max-rollouts", "24", "--set", "run.grace_s=0"]
    files = RunFiles(out / "tiny" / "gepa-seed0")
    (task / "hang").touch()
    process = started(command)
    run = psutil.Process(int(wait_for(task / "hanging", process)))
    assert in_use(files.root)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (task / "hang").unlink()
    again = started(command)  # at once: the run of the first command may still be ending
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert not run.is_running()
    assert_as_designed(files.root)
    assert len(read_json(out / "tiny" / "compare.json")["runs"]) == 2
