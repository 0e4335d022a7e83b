"""A disk that really is full, at each kind of write: a sentence that names the file, and a resume to the same result.

The disk is a small tmpfs. Where none may be mounted, a limit on the size of files stands in for it.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest

from fst_optimizer.errors import StorageError
from fst_optimizer.failpoints import inject
from helpers.toy import answer, assert_same_run, run_toy

pytestmark = pytest.mark.slow  # dozens of whole runs

ROOMY, PAGE = 64 << 20, os.sysconf("SC_PAGE_SIZE")
TELLS = r"(\S+) could not be written \(No space left on device\): make room or give access, then resume"
VALUES = {"budget.max_cycles": 1}
KINDS = {
    "an adapter": r"policy/policy-000001",
    "an optimizer": r"checkpoint/000005",
    "the trainer's numbers": r"trainer\.json",
    "a checkpoint's state": r"checkpoint/000005/state\.json",
    "state.json": r"run/state\.json",
    "the journal": r"journal/000002\.jsonl",
    "the metrics": r"metrics\.jsonl",
    "a population": r"population/cycle-000000\.json",
    "a sample of rollouts": r"rollouts/cycle-000000\.jsonl",
    "the program": r"program\.json",
    "the result": r"result\.json",
    "the settings": r"config\.json",
}


class Disk:
    """A tmpfs, of which the tests choose the size."""

    def __init__(self, place):
        self.place = place
        self.ballast = place / "ballast"

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.place], check=True)

    def fill(self):
        """Leave no page free."""
        with self.ballast.open("ab", buffering=0) as handle:
            try:
                while True:
                    handle.write(b"x" * PAGE)
            except OSError:
                pass

    def used(self):
        found = os.statvfs(self.place)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "none", place]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("NO TMPFS MAY BE MOUNTED HERE: a full disk is tried by a limit on files alone")
    yield Disk(place)
    # Lazily, since loaded adapters are memory-mapped files.
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def whole(scripted, tmp_path):
    """The run that nothing disturbs."""
    run_toy(tmp_path / "whole", scripted(answer), values=VALUES)
    return tmp_path / "whole"


def run_and_resume(disk, scripted, sized):
    """The file at which a run on a disk of this size stopped; None where it came to its end."""
    run_dir, stopped_at = disk.place / "run", None
    try:
        with sized():
            run_toy(run_dir, scripted(answer), values=VALUES)
    except StorageError as error:
        stopped_at = re.search(TELLS, str(error))[1]
    disk.resize(ROOMY)
    disk.ballast.unlink(missing_ok=True)
    if stopped_at is not None:  # where not even the settings were written, there is no run to resume
        run_toy(run_dir, scripted(answer), values=VALUES, resume=(run_dir / "config.json").exists())
    return stopped_at


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_at_a_write_stops_the_run_with_a_sentence_and_costs_nothing(disk, scripted, whole, kind):
    filled = []

    def fill(path):
        if not filled and re.search(f"{KINDS[kind]}$", str(path)):
            disk.fill()
            filled.append(path)
        return path

    stopped_at = run_and_resume(disk, scripted, lambda: inject("files.write", fill))
    assert filled
    assert stopped_at, "the disk was full, and nobody noticed"
    assert_same_run(whole, disk.place / "run")


def test_disks_of_many_sizes_are_full_at_many_places_and_none_costs_anything(disk, scripted, whole):
    run_toy(disk.place / "run", scripted(answer), values=VALUES)
    pages = disk.used() // PAGE
    found = set()
    for number in range(12):
        shutil.rmtree(disk.place / "run")
        size = PAGE * (2 + (pages - 2) * number // 12)

        @contextmanager
        def sized(size=size):
            disk.resize(size)
            yield

        try:
            stopped_at = run_and_resume(disk, scripted, sized)
        except ValueError as error:  # too small for the folder itself
            assert "cannot be written" in str(error) and number == 0
            (disk.place / "run").mkdir(exist_ok=True)
            disk.resize(ROOMY)
            continue
        if stopped_at is not None:
            found.add(stopped_at)
        assert_same_run(whole, disk.place / "run")
    assert len(found) >= 4, found


@contextmanager
def limit_that_can_be_set():
    """Gives what makes every file too large, as long as it lasts: a full disk without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("kind", ["an adapter", "an optimizer", "the journal", "the program"])
def test_a_file_that_may_not_grow_stops_the_run_in_the_same_way(scripted, whole, tmp_path, kind):
    with limit_that_can_be_set() as limit:

        def stop(path):
            if re.search(f"{KINDS[kind]}$", str(path)):
                limit()
            return path

        with inject("files.write", stop), pytest.raises(StorageError, match=r"could not be written \(File too large\)"):
            run_toy(tmp_path / "run", scripted(answer), values=VALUES)
    run_toy(tmp_path / "run", scripted(answer), values=VALUES, resume=True)
    assert_same_run(whole, tmp_path / "run")
