"""Whose a folder is that a run would be written into, and that nothing in a run's folder leads out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fst_optimizer.errors import UserError

LOG = "vllm.log"
"""What a run leaves that ended before it wrote its `config.json`, besides hidden files."""
FILES = ("config.json", "state.json", "metrics.jsonl", "program.json", "result.json", LOG)
FOLDERS = ("checkpoint", "journal", "policy", "population", "rollouts")
"""What of a run directory is read or written. The directory itself may be a link: the caller names it."""


def check_place(root: Path, what: str = "run_dir") -> None:
    """A folder that a run, or what is made of one, may be written into.

    Raises:
        UserError: it is the file system's root, somebody's home, or the current folder without a run in it.
    """
    if root == Path() and not any((root / name).exists() for name in (*FILES, *FOLDERS)):
        raise UserError(
            f"{what} is '.', the current directory, as an empty name is too, and there is no run in it: give a folder "
            "of its own, e.g. runs/first"
        )
    place = root.resolve()
    for other, said in ((Path(place.anchor), "the root of the file system"), (Path.home().resolve(), "your home")):
        if place == other:
            raise UserError(f"{what} is {str(root)!r}, {said}: give a folder of its own, e.g. runs/first")


def check_free(root: Path) -> None:
    """A folder without a run in it has nothing else in it either, but for hidden files.

    Raises:
        UserError: it holds something.
    """
    others = sorted(
        path.name for path in root.glob("*") if path.name != LOG and not (path.name.startswith(".") and path.is_file())
    )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"run_dir {str(root)!r} holds {others[0]!r}{more}, and no run: give a new folder, or an empty one"
        )


def check_links(root: Path, *, to_write: bool = False) -> None:
    """Nothing that is read of a run directory is a link, at any depth, or a pipe or a device.

    Before it is written to, nothing else in it may lead out of it either.

    Raises:
        UserError: names what is.
    """
    for entry in root.rglob("*"):
        mode, top = entry.lstat().st_mode, entry.relative_to(root).parts[0]
        ours = top in FILES or top in FOLDERS or (top.startswith(".") and entry.parent == root)
        out = stat.S_ISLNK(mode) and not entry.resolve().is_relative_to(root.resolve())
        if stat.S_ISLNK(mode) and (ours or (out and to_write)):
            where = "leads out of the run directory, to" if out else "leads to"
            raise UserError(
                f"{entry} is a link and {where} {os.readlink(entry)!r}: a run directory has no links; remove it, or "
                "copy what it names"
            )
        if ours and not stat.S_ISLNK(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{entry} is neither a file nor a folder: no run leaves such a thing; remove it")
