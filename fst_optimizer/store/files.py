"""Where a run's files are, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fst_optimizer.errors import StorageError, UserError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.store.folders import NO_FOLLOW, remove_half_written, take
from fst_optimizer.store.guard import check_free, check_links, check_place

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a LoRA adapter, as peft and vLLM name them."""

LOCK = ".lock"
MOST_BYTES = 256 << 20
"""Of a JSON file that is read at once."""
CHECKPOINT = re.compile(r"\d{6,}")
JOURNAL = re.compile(r"\d{6,}\.jsonl")
ADAPTER = re.compile(r"policy-\d{6,}")
CYCLE = re.compile(r"cycle-\d{6,}\.jsonl?")
"""The names that a run gives to what is in its folders. Whatever else lies there is the user's and stays."""


class RunFiles:
    """The paths in one run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        """Everything needed to repeat the run."""
        self.state = root / "state.json"
        """Names the last committed checkpoint; replaced last."""
        self.metrics = root / "metrics.jsonl"
        """One JSON object a line."""
        self.program = root / "program.json"
        """The compiled program's DSPy state, without its LM."""
        self.result = root / "result.json"
        """The finished run in one object; its presence means finished."""

    def checkpoint(self, number: int) -> Path:
        """The run's n-th checkpoint: its state and the optimizer's."""
        return self.root / "checkpoint" / f"{number:06d}"

    def journal(self, number: int) -> Path:
        """Rollouts and reflections made after the n-th checkpoint."""
        return self.root / "journal" / f"{number:06d}.jsonl"

    def policy(self, version: int) -> Path:
        """The LoRA adapter of a policy version."""
        return self.root / "policy" / f"policy-{version:06d}"

    def adapter(self, version: object) -> Path:
        """The LoRA adapter of a policy version, to read.

        Raises:
            UserError: the version is no number, or its files lie outside of the run directory.
        """
        if not isinstance(version, int) or isinstance(version, bool):
            raise UserError(f"{self.root}: policy_version is {version!r}, which is no number; is this a run directory?")
        folder = self.policy(version)
        for path in (folder, *folder.glob("*")):
            if not self.holds(path):
                raise UserError(
                    f"{path} leads out of the run directory, to {path.resolve()}: copy the files themselves"
                )
        return folder

    def holds(self, path: Path) -> bool:
        """Whether a path stays in the run directory, links followed."""
        return path.resolve().is_relative_to(self.root.resolve())

    def drop_journals(self) -> None:
        """Remove all journals."""
        for path in self.journal(0).parent.glob("*.jsonl"):
            if JOURNAL.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def manifests(self) -> list[Path]:
        """The states beside the checkpoints, newest first."""
        folders = [path for path in (self.root / "checkpoint").glob("*") if CHECKPOINT.fullmatch(path.name)]
        return [folder / "state.json" for folder in sorted(folders, reverse=True) if (folder / "state.json").exists()]

    def population(self, cycle: int) -> Path:
        """Candidates, scores and lineage after a fast round."""
        return self.root / "population" / f"cycle-{cycle:06d}.json"

    def rollouts(self, cycle: int) -> Path:
        """A bounded sample of a cycle's rollouts, to read."""
        return self.root / "rollouts" / f"cycle-{cycle:06d}.jsonl"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Only one process at a time writes a run directory. The lock goes with the process, however it ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written, or the lock is no file of the run's.
    """
    _check_is_folder(root)
    try:
        failpoint("files.write", root)
        root.mkdir(parents=True, exist_ok=True)
        path = root / LOCK
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is a link, or no file: remove it, or give another directory")
        # Not followed, should it become a link at this moment: what it names would be made, or locked.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"run_dir {str(root)!r} cannot be written ({error}): give another directory") from error
    try:
        if not take(descriptor):
            raise UserError(
                f"run_dir {str(root)!r} is being written by another process: wait for it, or give another directory"
            )
        yield
    finally:
        os.close(descriptor)


def in_use(root: Path) -> bool:
    """Whether a process holds a run directory's lock."""
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR | NO_FOLLOW)
    except OSError:
        return False
    try:
        return not take(descriptor)
    finally:
        os.close(descriptor)


def _check_is_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise UserError(f"run_dir {str(root)!r} is a file: give a directory")


def check_run_dir(root: Path, *, resume: bool) -> bool:
    """Whether there is a state to resume in a run's directory; nothing is written.

    Raises:
        UserError: the directory holds a finished run, an unfinished one and `resume` is off, or none and it is on; or
            it is a file, somebody's home, or holds something that is no run's; or there are links in it.
    """
    _check_is_folder(root)
    files = RunFiles(root)
    check_place(root)
    check_links(root, to_write=True)
    if files.result.exists():
        raise UserError(f"run_dir {str(root)!r} holds a finished run: give another directory, or delete this one")
    # The first checkpoint is written before the first rollout: one alone, without state.json, has nothing to resume.
    committed = files.state.exists() or any(int(path.parent.name) > 1 for path in files.manifests())
    if committed and not resume:
        raise UserError(
            f"run_dir {str(root)!r} holds an unfinished run: resume it (--resume, or resume=True), "
            "or give another directory"
        )
    if resume and not committed and not _is_runs(files.config):
        raise UserError(
            f"run_dir {str(root)!r} holds no run to resume{_others(root)}: leave --resume (resume=True) out to start "
            "a new run there"
        )
    if not committed and not _is_runs(files.config):
        check_free(root)
    return committed


def open_run(root: Path, *, resume: bool) -> tuple[RunFiles, bool]:
    """The run's files, and whether there is a state to resume.

    A run that died before its first checkpoint is begun again, with a warning where it was to be resumed. So is one
    that kept no rollout, without one: its program may have been wrong, and be another now. Hold the directory's lock:
    what was half written when a process was killed is removed.

    Raises:
        UserError: as `check_run_dir` does.
    """
    files = RunFiles(root)
    committed = check_run_dir(root, resume=resume)
    if _is_runs(files.config):
        remove_half_written(root)
    if committed:
        if not _nothing_ran(files):
            _check_kinds(files)
            return files, True
        files.state.unlink(missing_ok=True)
    elif resume:
        logger.warning("the run in %s ended before its first checkpoint: it starts from the beginning", root)
    root.mkdir(parents=True, exist_ok=True)
    _clear(files)
    return files, False


def _check_kinds(files: RunFiles) -> None:
    """What a resume reads and writes on is files of this folder. Checkpoints and adapters are checked one by one.

    Raises:
        UserError: names what is a link, or no file.
    """
    logs = [path for folder in ("journal", "rollouts", "population") for path in files.root.glob(f"{folder}/*")]
    for path in (files.config, files.state, files.metrics, *logs):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "no file"
            raise UserError(f"{path} is {kind}: a run goes on from its own files; put the file there, or remove this")


def runs_in(folder: Path) -> list[Path]:
    """The run directories in a folder, the newest first."""
    found = [path for path in folder.glob("*/config.json") if _is_runs(path)]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def new_run_dir(name: str) -> Path:
    """`runs/NAME-YYYYMMDD-HHMMSS`, for a run whose directory was not said."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _others(root: Path) -> str:
    """Which runs may have been meant: those in the folder, or those beside it with a name like it."""
    inside, beside = runs_in(root), {path.name: path for path in runs_in(root.parent)}
    near = inside or [beside[name] for name in get_close_matches(root.name, beside)]
    names = [f"{path}{' (finished)' if RunFiles(path).result.exists() else ''}" for path in near[:5]]
    return f" (there is {', '.join(names)})" if names else ""


def _nothing_ran(files: RunFiles) -> bool:
    """Whether a run has only its first checkpoint, of the base, and not one rollout, a dry run's included."""
    manifests = files.manifests()
    if [path.parent for path in manifests] != [files.checkpoint(1)]:
        return False
    try:
        counts = read_json(manifests[0])["state"]["rollouts"]
    except (UserError, KeyError):
        return False
    lines = [path for path in (*files.journal(0).parent.glob("*.jsonl"), files.metrics) if path.exists()]
    written = [path for path in lines if path.stat().st_size] + [*files.policy(0).parent.glob("*")]
    return not written and not any(counts.values())


def _clear(files: RunFiles) -> None:
    """Remove what a run that died before its first checkpoint left.

    Raises:
        UserError: there are files with the names of a run's, and no run's config beside them.
    """
    folders = {"checkpoint": CHECKPOINT, "journal": JOURNAL, "policy": ADAPTER, "population": CYCLE, "rollouts": CYCLE}
    found = [
        path
        for name, pattern in folders.items()
        for path in (files.root / name).glob("*")
        if pattern.fullmatch(path.name)
    ]
    found += [files.metrics] if files.metrics.exists() else []
    if found and not _is_runs(files.config):
        raise UserError(f"run_dir {str(files.root)!r} holds {found[0]}, which is of no run: give another directory")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_runs(config: Path) -> bool:
    try:
        return {"task", "config", "policy", "data", "versions"} <= read_json(config).keys()
    except UserError:
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Put this around whatever writes `path`.

    Raises:
        StorageError: It could not be written.
    """
    try:
        failpoint("files.write", path)
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise StorageError(
            f"{path} could not be written ({reason}): make room or give access, then resume; "
            "the run's last checkpoint stands"
        ) from error


def _disk_reason(error: Exception) -> str | None:
    """Why the disk refused; None where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors has an error of its own: "Error while serializing: I/O error: No space left on device (os error 28)".
    if type(error).__name__ == "SafetensorError" and "I/O error: " in str(error):
        return str(error).partition("I/O error: ")[2].partition(" (os error")[0]
    return None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace `path` atomically: a crash leaves the old file or the new one.

    Raises:
        StorageError: It could not be written; the old file stands.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # Text that is no Unicode (a file's name in an error) becomes an escape, which JSON reads too.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing or is no JSON object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES >> 20} MiB, which no file of a run is")
        data = parse_json(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        hint = "; is this a run directory?" if path.name in ("config.json", "state.json", "result.json") else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a JSON file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give access") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not an object")
    return data


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, an object has a name twice, a number is too long, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice; keep one")
    return found


def checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's content, or a rename in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
