"""Temporary folders that are known as ours, so that what a killed process left of them can be removed.

Each holds a marker file that its process has locked for as long as it lives. The next process that makes one of the
same kind in the same place removes those whose marker nobody holds. A folder without a marker, of another user or
behind a link is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: there, nobody notices two processes, and nothing is removed
    fcntl = None  # type: ignore[assignment]

MARKER = ".fst-temporary"
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""For opening a file that may have become a link, or a pipe, that somebody else put there."""

HALF_WRITTEN = re.compile(
    r"\.(config|state|result)\.json\.tmp|\.metrics\.jsonl\.tmp|\.program\.tmp\.json|population/\.cycle-\d{6,}\.json\.tmp"
    r"|checkpoint/\d{6,}/\.(state|trainer)\.json\.tmp|policy/\.policy-\d{6,}\.[a-z0-9_]{8}"
)
"""What a process was writing in a run directory when it was killed."""


class TemporaryFolder:
    """A new folder for as long as this process lives, or until `close`, or until nobody has this object any more.

    Without `abandoned_if_killed` it has no marker: whoever else uses it may go on when this process is killed.
    """

    def __init__(self, prefix: str, parent: str | Path | None = None, *, abandoned_if_killed: bool = True) -> None:
        place = Path(parent or tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place)).resolve()
        """Where it is."""
        marker = _marked(self.path) if abandoned_if_killed else None
        self.close = weakref.finalize(self, _remove, self.path, marker, os.getpid())
        """Removes it."""
        self.close.atexit = abandoned_if_killed


@contextmanager
def temporary_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """The same, for as long as the block runs."""
    made = TemporaryFolder(prefix, parent)
    try:
        yield made.path
    finally:
        made.close()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary folders with this prefix that processes left which are gone."""
    name = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if fcntl and name.fullmatch(entry.name) and _is_own_folder(entry):
                _remove_if_abandoned(Path(entry.path))


def remove_half_written(run_dir: Path) -> None:
    """Remove what was being written in a run directory when a process was killed. Hold the directory's lock."""
    for path in list(run_dir.rglob(".*")):
        if HALF_WRITTEN.fullmatch(path.relative_to(run_dir).as_posix()):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def take(descriptor: int) -> bool:
    """Lock a file that is open; False where another process has it. The lock goes when the file is closed."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    about = entry.stat(follow_symlinks=False)
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):
        marker = os.open(folder / MARKER, os.O_RDWR | NO_FOLLOW)
        if stat.S_ISREG(os.fstat(marker).st_mode) and take(marker):
            _remove(folder, marker, os.getpid())
        else:
            os.close(marker)


def _marked(folder: Path) -> int:
    """The open marker in a new folder. It gets its name when it is locked: before, nobody takes it for a marker."""
    new = folder / f"{MARKER}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
    take(descriptor)
    os.rename(new, folder / MARKER)
    return descriptor


def _remove(folder: Path, marker: int | None, process: int) -> None:
    if process == os.getpid():  # not at the end of a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
    if marker is not None:
        os.close(marker)
