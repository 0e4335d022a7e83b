"""`fst lab compare` as a process: killed, and started again."""

import json
import signal

import psutil
import pytest
from typer.testing import CliRunner

from fst_optimizer.cli.main import app
from fst_optimizer.lab.cells import comparison_jobs
from fst_optimizer.lab.launch import RunFailed, run_all
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.store.files import RunFiles, in_use, read_json
from fst_optimizer.task_run import plan_run
from helpers.run_check import assert_as_designed
from helpers.runs import RL_CURVE, write_run
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


class Copying(Job):
    """A run that takes no time: its process copies a result that lies ready, or fails where none does."""

    def command(self):
        return ["json.tool", str(self.folder.with_suffix(".ready")), str(RunFiles(self.folder).result)]


def test_a_run_that_fails_is_told_and_stops_none_of_the_others(tmp_path):
    jobs = [Copying("task", "fst", seed, tmp_path / f"fst-seed{seed}", Common(10)) for seed in range(4)]
    for job in jobs:
        job.folder.mkdir()
        if job.seed != 1:
            result = {"val_score_before": 0.25, "val_score_after": 0.5}
            job.folder.with_suffix(".ready").write_text(json.dumps(result))
    said = []
    with pytest.raises(RunFailed) as failure:
        run_all(jobs, at_once=2, tell=said.append)
    assert str(failure.value) == (
        f"1 of 4 runs ended without a result: {tmp_path.name}/fst-seed1, see {tmp_path / 'fst-seed1.log'}"
    )
    told = {line.split(" ")[0]: line for line in said if "started" not in line}
    assert "validation 0.250 -> 0.500" in told["[4/4]"]
    assert "failed with exit code 2; the end of" in told["[2/4]"] and "No such file" in told["[2/4]"]
    jobs[1].folder.with_suffix(".ready").write_text(jobs[0].folder.with_suffix(".ready").read_text())
    said.clear()
    run_all(jobs, at_once=2, tell=said.append)
    assert said[0] == "3 of 4 runs were finished before" and len(said) == 3


def test_by_kinds_a_comparison_is_written_of_what_is_finished(tmp_path, tiny_model):
    pytest.importorskip("matplotlib")
    task, out = write_task(tmp_path / "tiny", tiny_model), tmp_path / "out"
    (job,) = comparison_jobs(str(task), out / "tiny", ("rl",), (0,), Common(24), {})
    config = plan_run(job.request).settings.config.to_dict()
    write_run(job.folder, "rl", 0, RL_CURVE, task=str(task), config=config)
    command = ["lab", "compare", str(task), "--out", str(out), "--methods", "fst+bad,rl", "--seeds", "each"]
    command += ["--kinds", "told", "--max-rollouts", "24", "--set-method", "fst+bad.predictors.nobody=both"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 1, said.output
    assert "1 of 2 runs were finished before" in said.output
    assert "the student has no such predictor" in said.output  # the end of the failed run's log
    assert "1 of 2 runs ended without a result: tiny+told/fst+bad-seed0, see" in said.output
    data = read_json(out / "tiny+told" / "compare.json")
    assert (data["task"], data["rule"], data["kind"]) == (f"{task}:+told", "tiny", "told")
    assert data["missing"] == ["fst+bad-seed0"]
    (rl,) = data["runs"]
    assert (rl["dir"], rl["told"]["feedback"]) == ("../tiny/rl-seed0", False)
    planned = CliRunner().invoke(app, [*command, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "2 runs, 1 finished" in planned.output and "finished yet: fst+bad." in planned.output
