"""A study on a real PostgreSQL, shared by workers of two commands."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from fst_optimizer.store.files import read_json
from helpers.postgres import need_postgres, postgres
from helpers.tune import check_killed_study, options, started, trials_of, wait_for


@pytest.fixture(scope="module")
def database():
    """The URL of a database; its folder is where the user of the server may look."""
    programs = need_postgres()
    with tempfile.TemporaryDirectory(prefix="fst-pg-") as folder:
        os.chmod(folder, 0o755)
        with postgres(programs, Path(folder) / "cluster") as url:
            yield url


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_killed_in_mid_trial_is_made_up_for(task, tmp_path, database):
    """Two commands, as on two machines: one worker is killed with its command, the other finds out and goes on."""
    (task / "hang").touch()
    more = ("--trials", 5, "--storage", database, "--study", "shared", "--heartbeat-s", 1)
    first = started(options(task, tmp_path / "a", *more))
    second = None
    try:
        worker = int(wait_for(task / "hanging", first))
        second = started(options(task, tmp_path / "b", *more))
        wait_for(tmp_path / "b" / "command.json", second)
        first.kill()
        os.kill(worker, signal.SIGKILL)
        said, _ = second.communicate(timeout=400)
    finally:
        for process in filter(None, (first, second)):
            process.kill()
    assert second.returncode == 0, said
    trials = trials_of(database, "shared")
    (killed,) = [trial.number for trial in trials if trial.state.name == "FAIL"]
    check_killed_study(trials, 5, killed)
    assert read_json(tmp_path / "b" / "tune.json")["states"]["fail"] == 1


@pytest.mark.next
@pytest.mark.timeout(600)
def test_two_workers_of_one_command_one_killed(task, tmp_path, database):
    (task / "hang").touch()
    more = ("--trials", 5, "--storage", database, "--study", "pair", "--heartbeat-s", 1, "--workers", 2)
    process = started(options(task, tmp_path / "c", *more))
    try:
        os.kill(int(wait_for(task / "hanging", process)), signal.SIGKILL)
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, said
    trials = trials_of(database, "pair")
    (killed,) = [trial.number for trial in trials if trial.state.name == "FAIL"]
    check_killed_study(trials, 5, killed)
    hosts = {trial.user_attrs.get("host") for trial in trials}
    assert len(hosts) == 1 and database not in (tmp_path / "c" / "command.json").read_text()
