"""`fst tune` and its worker processes, on SQLite."""

import os
import signal
import sys

import psutil
import pytest

from fst_optimizer.store.files import read_json
from helpers.fst import fst
from helpers.run_check import assert_as_designed
from helpers.tune import check_killed_study, options, started, trials_of, wait_for

# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_from_start_to_end_and_the_winner_compiled_again(task, tmp_path):
    folder = tmp_path / "study"
    said = fst(*options(task, folder, "--trials", 2, "--repeats", 1, "--workers", 2))
    assert said.exit_code == 0, said.output
    assert "trial 0 running" in said.stderr and "trial 0 complete" in said.stderr
    assert "finished  2 of 2 trials" in said.stdout and "verdict   trial" in said.stdout
    summary = read_json(folder / "tune.json")
    assert summary["command"].startswith("fst") and summary["states"] == {"complete": 2}
    assert summary["study"] == "tiny-0"
    for row in summary["trials"]:
        assert_as_designed(folder / "trials" / f"trial-{row['trial']:06d}")
    best = read_json(folder / "best.json")
    score = next(row["score"] for row in summary["trials"] if row["trial"] == summary["best"])
    again = tmp_path / "again"
    compiled = fst("compile", str(task), "--config", str(folder / "best.json"), "--run-dir", str(again))
    assert compiled.exit_code == 0, compiled.output
    assert read_json(again / "result.json")["val_score_after"] == best["score"] == score
    assert read_json(again / "config.json")["config"] == best["config"]

    same = fst(*options(task, folder, "--trials", 2, "--repeats", 1))
    assert same.exit_code == 0, same.output
    assert {**read_json(folder / "tune.json"), "command": ""} == {**summary, "command": ""}
    assert "running" not in same.stderr


@pytest.mark.slow
def test_two_workers_share_a_study_on_sqlite_and_one_that_is_killed_is_made_up_for(task, tmp_path):
    folder = tmp_path / "study"
    (task / "hang").touch()
    process = started(options(task, folder, "--trials", 4, "--workers", 2, "--heartbeat-s", 1))
    try:
        os.kill(int(wait_for(task / "hanging", process)), signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    trials = trials_of(f"sqlite:///{folder / 'study.db'}", "tiny-0")
    (killed,) = [trial.number for trial in trials if trial.state.name == "FAIL"]
    check_killed_study(trials, 4, killed)
    assert f"again trial {killed}" in (folder / "report.md").read_text()
    assert "worker killed" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_a_study_that_goes_on(task, tmp_path):
    folder = tmp_path / "study"
    (task / "hang").touch()
    process = started(options(task, folder, "--trials", 2, "--set", "run.grace_s=0"))
    try:
        wait_for(task / "hanging", process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted; the same command goes on" in said
    trials = trials_of(f"sqlite:///{folder / 'study.db'}", "tiny-0")
    states = [trial.state.name for trial in trials]
    assert states.count("FAIL") == 1 and "RUNNING" not in states
    said = fst(*options(task, folder, "--trials", 2, "--set", "run.grace_s=0"))
    assert said.exit_code == 0, said.output
    rows = read_json(folder / "tune.json")["trials"]
    assert sum(row["state"] in ("complete", "pruned") for row in rows) == 2
    assert [row["cause"] for row in rows if row["state"] == "fail"] == ["interrupted"]


@pytest.mark.slow
def test_workers_end_with_a_command_that_is_killed_and_the_same_command_goes_on(task, tmp_path):
    folder = tmp_path / "study"
    (task / "hang").touch()
    process = started(options(task, folder, "--trials", 2, "--set", "run.grace_s=0"))
    worker = psutil.Process(int(wait_for(task / "hanging", process)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    trials = trials_of(f"sqlite:///{folder / 'study.db'}", "tiny-0")
    assert "RUNNING" not in [trial.state.name for trial in trials]
    said = fst(*options(task, folder, "--trials", 2, "--set", "run.grace_s=0"))
    assert said.exit_code == 0, said.output
    rows = read_json(folder / "tune.json")["trials"]
    assert sum(row["state"] in ("complete", "pruned") for row in rows) == 2
    assert [row["cause"] for row in rows if row["state"] == "fail"] == ["interrupted"]


@pytest.mark.slow
def test_a_worker_that_gives_up_says_why(task, tmp_path):
    (task / "fail").touch()
    said = fst(*options(task, tmp_path / "study", "--trials", 2))
    assert said.exit_code == 1
    assert "3 trials in a row failed of the same cause, metric" in said.stderr
    (task / "fail").unlink()
    said = fst(*options(task, tmp_path / "study", "--trials", 2))
    assert said.exit_code == 0, said.output


# -- what bad input gets ------------------------------------------------------------------------------------------

BAD = {
    "no trials": (("--trials", 0), "trials is 0"),
    "no workers": (("--trials", 1, "--workers", 0), "workers is 0"),
    "no database": (("--trials", 1, "--storage", "postgresql://me:secret@127.0.0.1:1/db"), "it cannot be reached"),
    "no such objective": (("--trials", 1, "--objectives", "score,second"), "did you mean 'seconds'"),
    "no such pruner": (("--trials", 1, "--pruner", "hyperbrand"), "did you mean 'hyperband'"),
    "no such setting": (("--trials", 1, "--set", "train.lrr=1"), "did you mean 'train.lr'"),
    "no space": (("--trials", 1, "--space", "nowhere.json"), "no such file"),
    "too little budget": (("--trials", 1, "--budget-rollouts", 5), "one trial may take 36"),
}


@pytest.mark.parametrize(("more", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(task, tmp_path, more, text):
    said = fst(*options(task, tmp_path / "study", *more))
    assert said.exit_code == 2, said.output
    assert text in said.stderr and said.stderr.count("\n") == 1
    assert "secret" not in said.stderr
    assert not (tmp_path / "study" / "trials").exists()


def test_passwords_are_kept_out_of_files_and_commands(task, tmp_path, monkeypatch):
    from fst_optimizer.cli.console import this_command
    from fst_optimizer.tuning.storage import shown_url

    monkeypatch.setattr(sys, "argv", ["fst", "tune", "x", "--storage", "postgresql://me:s3cret@host/db"])
    assert "s3cret" not in this_command() and "me:***@host" in this_command()
    assert shown_url("postgresql://me:s3cret@host/db") == "postgresql://me:***@host/db"
    assert shown_url("sqlite:///a.db") == "sqlite:///a.db"
