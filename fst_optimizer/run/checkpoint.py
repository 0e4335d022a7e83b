"""The one checkpoint: everything that a state names, and a crash at any instant leaves the last one or the next.

A commit writes adapters and the optimizer first, then the state beside them with the checksum of every file, and
replaces `state.json`, which names it, last. The few checkpoints before it are kept, so that a damaged file costs
no more than a phase: the journal that was written after the older one holds what the phase paid for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.faults import reach
from fst_optimizer.run.files import RunFiles, checksum, read_json, sync_file, write_json, writing
from fst_optimizer.run.state import State

if TYPE_CHECKING:
    from fst_optimizer.policy import Policy
    from fst_optimizer.train.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 2

_NAME = re.compile(r"checkpoint/\d{6,}")
_FILE = re.compile(r"(checkpoint/\d{6,}|policy/policy-\d{6,})/[\w.]+")


@dataclass(frozen=True)
class Committed:
    """A checkpoint on disk."""

    state: State
    number: int
    """Checkpoints of this run so far, this one included."""
    elapsed_s: float
    """Seconds that the run had taken."""
    metrics_size: int
    """Bytes of `metrics.jsonl` that belong to it."""
    checksums: Mapping[str, str]
    """File -> SHA-256, of all that it names."""


def commit(
    files: RunFiles,
    state: State,
    number: int,
    policy: Policy,
    trainer: Trainer | None,
    *,
    elapsed_s: float,
    metrics_size: int,
    keep: int = 2,
    checksums: Mapping[str, str] | None = None,
) -> Committed:
    """Make `state` the one that a resume starts from, then drop what no kept checkpoint names any more.

    Args:
        files: The run's.
        state: What to write down.
        number: Of this checkpoint.
        policy: Has the versions that the state names.
        trainer: None when the method has no slow steps.
        elapsed_s: Seconds that the run has taken.
        metrics_size: Bytes of `metrics.jsonl`, which must be safe on disk.
        keep: Checkpoints to keep, this one included.
        checksums: Those of the checkpoint before. A file that it names is not read again: damage since then must show.

    Raises:
        StorageError: something could not be written; the checkpoint before stands.
    """
    versions = sorted({version for version in (state.policy_version, state.best.policy_version) if version})
    for version in versions:
        if not files.policy(version).exists():
            with writing(files.policy(version)):
                policy.save_version(version, files.policy(version))
    folder = files.checkpoint(number)
    _write_trainer(folder, trainer)
    written = [path for version in versions for path in sorted(files.policy(version).iterdir())]
    written += [path for path in sorted(folder.iterdir()) if path.suffix != ".tmp"]
    known = {name: value for name, value in (checksums or {}).items() if name.startswith("policy/")}
    names = {path: _relative(files, path) for path in written}
    content = {
        "format": FORMAT,
        "checkpoint": _relative(files, folder),
        "elapsed_s": elapsed_s,
        "metrics_size": metrics_size,
        "files": {name: known.get(name) or checksum(path) for path, name in names.items()},
        "state": state.to_json(),
    }
    content["sha256"] = _digest(content)
    write_json(folder / "state.json", content)
    reach("files.commit", files.state)
    write_json(files.state, content)
    _drop_old(files, number, keep)
    policy.retire_all_but({*versions, policy.version})
    return _committed(content)


def restore(files: RunFiles, policy: Policy, trainer: Trainer | None) -> Committed:
    """Read the last checkpoint whose files are whole, and put policy and trainer back to it.

    Raises:
        UserError: the run is of another format, or no checkpoint is whole.
    """
    from safetensors.torch import load_file

    from fst_optimizer.train.adapters import load_adapter_tensors

    found = last_whole(files)
    state = found.state
    _forget_after(files, found, policy)
    for version in {state.best.policy_version, state.policy_version} - {0}:
        policy.restore(version, load_adapter_tensors(files.adapter(version)))
    version = state.policy_version
    policy.restore(version, load_adapter_tensors(files.adapter(version)) if version else None)
    policy.continue_numbers_from(version)
    if trainer:
        folder = files.checkpoint(found.number)
        tensors = load_file(folder / "optimizer.safetensors")
        trainer.load_state({"tensors": tensors, "numbers": read_json(folder / "trainer.json")})
    return found


def last_whole(files: RunFiles) -> Committed:
    """The newest checkpoint that is undamaged; says so where that is not the last one.

    Raises:
        UserError: the run is of another format, or no checkpoint is whole.
    """
    problems: list[str] = []
    for path in _manifests(files):
        problem, content = _checked(files, path)
        if content is not None and not problem:
            if problems:
                name = content["checkpoint"]
                logger.warning("%s; going on from the checkpoint before, %s", "; ".join(problems), name)
            return _committed(content)
        problems.append(problem)
    raise UserError(f"run_dir {str(files.root)!r} has no checkpoint that is whole: " + "; ".join(problems))


def _manifests(files: RunFiles) -> Iterator[Path]:
    """`state.json`, and the states of the checkpoints before the one that it names, newest first."""
    yield files.state
    try:
        named = str(read_json(files.state).get("checkpoint"))
    except ValueError:
        named = ""  # unreadable: any checkpoint may be the last
    for folder in sorted(_numbered(files), reverse=True):
        older = not _NAME.fullmatch(named) or folder.name < Path(named).name
        if older and (folder / "state.json").exists():
            yield folder / "state.json"


def _checked(files: RunFiles, path: Path) -> tuple[str, dict[str, Any] | None]:
    """What is wrong with a checkpoint, "" if nothing is, and its content."""
    try:
        content = read_json(path)
    except ValueError as error:
        return f"{path.name} is damaged ({error})", None
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; resume with the version "
            "of fst_optimizer that wrote it"
        )
    if content.get("sha256") != _digest(content):
        return f"{path.name} is damaged (its checksum is another)", None
    if not _NAME.fullmatch(content["checkpoint"]):
        return f"{path.name} names {content['checkpoint']!r}, which is no checkpoint", None
    for name, expected in content["files"].items():
        if not _FILE.fullmatch(name):
            return f"{path.name} names {name!r}, which is no file of a run", None
        file = files.root / name
        if not file.is_file() or not files.holds(file) or checksum(file) != expected:
            return f"{name} is {'damaged' if file.exists() else 'missing'}", content
    return "", content


def _committed(content: Mapping[str, Any]) -> Committed:
    return Committed(
        State.from_json(content["state"]),
        int(Path(content["checkpoint"]).name),
        content["elapsed_s"],
        content["metrics_size"],
        content["files"],
    )


def _digest(content: Mapping[str, Any]) -> str:
    """Of everything in a manifest but the digest itself."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_trainer(folder: Path, trainer: Trainer | None) -> None:
    from safetensors.torch import save_file

    trained = trainer.state() if trainer else {"tensors": {}, "numbers": {}}
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died before `state.json` named it
        folder.mkdir(parents=True)
        path = folder / "optimizer.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in trained["tensors"].items()}, path)
        sync_file(path)
    write_json(folder / "trainer.json", trained["numbers"])


def _drop_old(files: RunFiles, number: int, keep: int) -> None:
    """Remove checkpoints, journals and adapters that none of the last `keep` checkpoints needs."""
    kept, needed = set(), set()
    for folder in _numbered(files):
        if number - keep < int(folder.name) <= number:
            try:
                needed |= read_json(folder / "state.json")["files"].keys()
            except ValueError:
                continue  # damaged, and no longer the last: nobody will go back to it
            kept.add(folder.name)
    _keep_only(files.root / "checkpoint", "[0-9]*", kept)
    _keep_only(files.root / "journal", "[0-9]*.jsonl", {f"{name}.jsonl" for name in kept})
    adapters = {name.split("/")[1] for name in needed if name.startswith("policy/")}
    _keep_only(files.policy(0).parent, "policy-*", adapters)
    _keep_only(files.policy(0).parent, ".policy-*", set())  # half written, by a process that was killed


def _forget_after(files: RunFiles, found: Committed, policy: Policy) -> None:
    """Drop what came after a checkpoint, on disk and in memory: its version numbers will be given out again."""
    policy.retire_all_but(())
    older = {path.name for path in _numbered(files) if int(path.name) <= found.number}
    _keep_only(files.root / "checkpoint", "[0-9]*", older)
    named = {files.policy(version).name for version in (found.state.policy_version, found.state.best.policy_version)}
    newest = files.policy(found.state.policy_version).name
    adapters = files.policy(0).parent
    _keep_only(adapters, "policy-*", named | {path.name for path in adapters.glob("policy-*") if path.name < newest})


def _numbered(files: RunFiles) -> list[Path]:
    return [path for path in (files.root / "checkpoint").glob("[0-9]*") if path.name.isdigit()]


def _keep_only(folder: Path, pattern: str, names: set[str]) -> None:
    """Remove what has the run's own kind of name, but these; whatever else lies there is the user's."""
    for entry in folder.glob(pattern):
        if entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _relative(files: RunFiles, path: Path) -> str:
    return path.relative_to(files.root).as_posix()
