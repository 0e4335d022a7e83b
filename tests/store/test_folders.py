"""Temporary folders: removed with their process, or by the next one if it was killed; and nobody else's are."""

import os
import signal
import subprocess
import sys

import pytest

from fst_optimizer.store.files import RunFiles, open_run, write_json
from fst_optimizer.store.folders import MARKER, TemporaryFolder, remove_abandoned, temporary_folder

HOLDER = """
import sys, time
from fst_optimizer.store.folders import TemporaryFolder
made = TemporaryFolder("fst-x-", sys.argv[1], abandoned_if_killed=sys.argv[2] == "marked")
(made.path / "file").write_text("kept")
print(made.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a folder; gives both."""
    running = []

    def start(kind="marked"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), kind], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        return process, tmp_path / os.path.basename(process.stdout.readline().strip())

    yield start
    for process in running:
        process.kill()
        process.communicate()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_folder_of_a_process_that_was_killed_is_removed_by_the_next(holder, tmp_path):
    process, folder = holder()
    assert (folder / "file").exists()
    kill(process)
    assert folder.exists()
    with temporary_folder("fst-x-", tmp_path) as own:
        assert [path.name for path in tmp_path.iterdir()] == [own.name]
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_process_that_lives_stays(holder, tmp_path):
    _, folder = holder()
    remove_abandoned(tmp_path, "fst-x-")
    assert (folder / "file").read_text() == "kept"


def test_what_others_may_still_use_is_left(holder, tmp_path):
    process, folder = holder("unmarked")
    kill(process)
    remove_abandoned(tmp_path, "fst-x-")
    assert (folder / "file").exists()


def test_what_is_not_provably_ours_is_left(holder, tmp_path):
    (tmp_path / "fst-x-nomarker").mkdir()
    (tmp_path / "fst-x-other-name").mkdir()
    (tmp_path / "fst-x-other-name" / MARKER).touch()
    (tmp_path / "fst-x-afile123").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / MARKER).touch()
    (tmp_path / "fst-x-linkdirs").symlink_to(outside)
    (tmp_path / "fst-x-linkmark").mkdir()
    (tmp_path / "fst-x-linkmark" / MARKER).symlink_to(outside / MARKER)
    (tmp_path / "fst-x-pipemark").mkdir()
    os.mkfifo(tmp_path / "fst-x-pipemark" / MARKER)
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path, "fst-x-")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "fst-x-nomarker" / MARKER).touch()
    remove_abandoned(tmp_path, "fst-x-")
    assert not (tmp_path / "fst-x-nomarker").exists()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to make a folder of another user")
def test_the_folder_of_another_user_is_left(tmp_path):
    folder = tmp_path / "fst-x-somebody"
    folder.mkdir()
    (folder / MARKER).touch()
    os.chown(folder, 12345, 12345)
    remove_abandoned(tmp_path, "fst-x-")
    assert folder.exists()


def test_a_folder_goes_with_its_object_and_a_prefix_is_taken_as_it_is(tmp_path):
    one = TemporaryFolder(".out[1]*.", tmp_path)
    assert one.path.is_dir()
    del one
    assert not list(tmp_path.iterdir())
    remove_abandoned(tmp_path / "nowhere", "fst-x-")


HALF = (
    *(".config.json.tmp", ".state.json.tmp", ".metrics.jsonl.tmp", ".program.tmp.json"),
    *(
        "population/.cycle-000001.json.tmp",
        "checkpoint/000003/.trainer.json.tmp",
        "policy/.policy-000004.ab12_xyz/new/a",
    ),
)
OWN = (".tmp", ".notes.json.tmp", "mine/.state.json.tmp", "policy/.policy-000004.mine", "checkpoint/.state.json.tmp")


@pytest.mark.parametrize("resume", [True, False])
def test_what_was_half_written_in_a_run_directory_is_removed_at_the_next_start_and_nothing_else(tmp_path, resume):
    write_json(RunFiles(tmp_path).config, {"task": "t", "config": {}, "policy": {}, "data": {}, "versions": {}})
    if resume:
        write_json(RunFiles(tmp_path).state, {})
    for name in (*HALF, *OWN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    open_run(tmp_path, resume=resume)
    assert not [name for name in HALF if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in OWN)


def test_in_a_folder_that_is_no_runs_nothing_is_removed(tmp_path):
    (tmp_path / ".state.json.tmp").touch()
    open_run(tmp_path, resume=False)
    assert (tmp_path / ".state.json.tmp").exists()
