"""Checkpoints: everything that a state names, written so that a crash at any instant leaves the last one or the next.

A commit writes adapters and the optimizer first, then a manifest beside them (the state, and the checksum of every
file), and last replaces `state.json`, a copy of the manifest. A few older checkpoints are kept: where a file of the
newest is damaged, a resume starts from the one before and does one phase again, from that phase's journal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import check_format
from fst_optimizer.errors import UserError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    CHECKPOINT,
    JOURNAL,
    RunFiles,
    checksum,
    read_json,
    sync,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.train.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of `state.json`."""

OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
OWN_FILES = (ADAPTER_CONFIG, ADAPTER_TENSORS, OPTIMIZER, TRAINER)
"""The files of a checkpoint; whatever else lies in its folders is the user's."""
KEPT_FOR_VERSIONS = 4
"""Checkpoints kept at most beyond the number asked for, so that older weights are among them."""

_HALF_WRITTEN = re.compile(r"\.policy-\d{6,}\..*")
"""Adapters that were being written when the process was killed."""
_NAME = re.compile(r"checkpoint/\d{6,}")
_FILE = re.compile(rf"(checkpoint/\d{{6,}}|policy/policy-\d{{6,}})/({'|'.join(map(re.escape, OWN_FILES))})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    state: State
    number: int
    """Checkpoints of this run so far, this one included."""
    elapsed_s: float
    """Seconds that the run had taken."""
    metrics_size: int
    """Bytes of `metrics.jsonl` that belong to it."""
    metrics_sha256: str | None
    """Of these bytes. None where an earlier version of this package wrote it."""
    checksums: Mapping[str, str]
    """File -> SHA-256, of all that it names."""

    @classmethod
    def from_json(cls, manifest: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint that a manifest describes."""
        return cls(
            State.from_json(manifest["state"]),
            int(Path(manifest["checkpoint"]).name),
            manifest["elapsed_s"],
            manifest["metrics_size"],
            manifest.get("metrics_sha256"),
            manifest["files"],
        )


def commit(
    files: RunFiles,
    state: State,
    number: int,
    policy: Policy,
    trainer: Trainer | None,
    *,
    elapsed_s: float,
    metrics_size: int,
    metrics_sha256: str | None = None,
    run_id: str | None = None,
    keep: int = 2,
    checksums: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Make `state` the one that a resume starts from, then remove what no kept checkpoint names any more.

    The `metrics_size` bytes of `metrics.jsonl` must be safe on disk. `keep` checkpoints stay, this one included.
    `run_id` is the one in `config.json`: checkpoints of other runs are not taken for this one's.
    `checksums` are those of the checkpoint before: its adapters are not read again, as a fresh checksum would hide that
    one was damaged since.

    Raises:
        StorageError: something could not be written; the checkpoint before stands.
    """
    versions = sorted({version for version in (state.policy_version, state.best.policy_version) if version})
    for version in versions:
        if not files.policy(version).exists():
            policy.save_version(version, files.policy(version))
    folder = files.checkpoint(number)
    _write_trainer(folder, trainer)
    known = {name: value for name, value in (checksums or {}).items() if name.startswith("policy/")}
    sums = {}
    kept = sorted({*versions, *state.kept.values()})
    for path in (place / name for place in (*map(files.policy, kept), folder) for name in OWN_FILES):
        if path.exists():
            relative = path.relative_to(files.root).as_posix()
            sums[relative] = known.get(relative) or checksum(path)
    content = {
        "format": FORMAT,
        "run_id": run_id,
        "checkpoint": folder.relative_to(files.root).as_posix(),
        "elapsed_s": elapsed_s,
        "metrics_size": metrics_size,
        "metrics_sha256": metrics_sha256,
        "files": sums,
        "state": state.to_json(),
    }
    content["sha256"] = _digest(content)
    write_json(folder / "state.json", content)
    failpoint("files.commit", files.state)
    write_json(files.state, content)
    policy.retire_all_but({*versions, policy.version})
    with writing(files.root):
        _drop_old(files, number, keep)
    return Checkpoint.from_json(content)


def restore(files: RunFiles, policy: Policy, trainer: Trainer | None, run_id: str | None = None) -> Checkpoint:
    """Read the last checkpoint whose files are whole, and put policy and trainer back to it.

    Raises:
        UserError: the run is of another format, or no checkpoint is whole.
    """
    from safetensors.torch import load_file

    from fst_optimizer.model.lora import load_adapter_tensors

    found = last_whole(files, run_id)
    version, best = found.state.policy_version, found.state.best.policy_version
    _forget_after(files, found, policy)
    for wanted in (best, version):  # the one that the policy goes on from is last
        policy.restore(wanted, load_adapter_tensors(files.adapter(wanted)) if wanted else None)
    policy.continue_numbers_from(version)
    if trainer:
        folder = files.checkpoint(found.number)
        tensors = load_file(folder / OPTIMIZER)
        trainer.load_state({"tensors": tensors, "numbers": read_json(folder / TRAINER)})
    return found


def last_whole(files: RunFiles, run_id: str | None = None) -> Checkpoint:
    """The newest checkpoint of this run that is undamaged; warns where that is not the last one.

    Every checkpoint names the best pair's adapter. Where nothing but that is damaged, the best pair is given up.

    Raises:
        UserError: the run is of another format, or no checkpoint is whole.
    """
    problems: list[str] = []
    usable: list[tuple[Checkpoint, str]] = []
    for path in (files.state, *files.manifests()):
        content = _read(path, run_id, problems)
        if content is None:
            continue
        found = Checkpoint.from_json(content)
        needed = _needed(files, found)
        damaged = [name for name in needed if not _whole(files, name, found.checksums[name])]
        if not damaged:
            if problems:
                logger.warning("%s; going on from %s", "; ".join(problems), content["checkpoint"])
            return found
        problem = ", ".join(f"{name} is damaged or missing" for name in damaged)
        problems += [problem] if problem not in problems else []
        state = found.state
        only_best = {files.policy(state.best.policy_version).name} - {files.policy(state.policy_version).name}
        if {Path(name).parent.name for name in damaged} <= only_best:
            best = Best(state.population.best, state.policy_version)
            usable.append((replace(found, state=replace(state, best=best, validated={})), problem))
    if usable:
        found, problem = usable[0]
        logger.warning(
            "%s; going on without it: the best pair so far is lost, the next evaluation names another", problem
        )
        return found
    raise UserError(f"run_dir {str(files.root)!r} has no checkpoint that is whole: " + "; ".join(problems))


def _needed(files: RunFiles, found: Checkpoint) -> list[str]:
    """The files that a resume needs: not the adapters that are kept for `fst lab drift` alone."""
    state = found.state
    spare = {files.policy(v).name for v in set(state.kept.values()) - {state.policy_version, state.best.policy_version}}
    return [name for name in found.checksums if Path(name).parent.name not in spare]


def _read(path: Path, run_id: str | None, problems: list[str]) -> dict[str, Any] | None:
    """The manifest at `path`; None where it cannot be trusted, and why is added to `problems`."""
    name = "/".join(path.parts[-3:]) if path.parent.name.isdigit() else path.name
    try:
        content = read_json(path)
    except ValueError as error:
        problems.append(f"{name} is damaged ({error})")
        return None
    number = content.get("format")
    if isinstance(number, int):  # else it is damaged
        check_format(path, number, FORMAT, FORMAT)
    if content.get("sha256") != _digest(content):
        problems.append(f"{name} is damaged (its checksum is another)")
    elif content.get("run_id") != run_id:
        problems.append(f"{name} is of another run (its run_id is not that of config.json)")
    elif not _NAME.fullmatch(content["checkpoint"]):
        problems.append(f"{name} names {content['checkpoint']!r}, which is no checkpoint")
    elif strange := [file for file in content["files"] if not _FILE.fullmatch(file)]:
        problems.append(f"{name} names {strange[0]!r}, which is no file of a run")
    else:
        return content
    return None


def _whole(files: RunFiles, name: str, expected: str) -> bool:
    path = files.root / name
    try:
        return path.is_file() and files.holds(path) and checksum(path) == expected
    except OSError:  # a bad sector
        return False


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
        path = folder / OPTIMIZER
        save_file({name: tensor.contiguous() for name, tensor in trained["tensors"].items()}, path)
        sync(path)
        sync(folder.parent)
    write_json(folder / TRAINER, trained["numbers"])


def _drop_old(files: RunFiles, number: int, keep: int) -> None:
    """Remove checkpoints, journals and adapters that are not needed any more.

    The last `keep` checkpoints stay, and a few more where these all have the same weights: one damaged adapter must not
    make all of them useless.
    """
    kept: set[str] = set()
    needed: set[str] = set()
    versions: set[int] = set()
    for path in files.manifests():
        if len(kept) >= keep and (len(versions) >= keep or len(kept) >= keep + KEPT_FOR_VERSIONS):
            break
        try:
            content = read_json(path)
            names, version = set(content["files"]), int(content["state"]["policy_version"])
        except (ValueError, KeyError):
            continue  # damaged: no resume would start there
        if int(path.parent.name) <= number:
            kept.add(path.parent.name)
            needed |= names
            versions.add(version)
    _keep_only(files.root / "checkpoint", CHECKPOINT, kept)
    _keep_only(files.root / "journal", JOURNAL, {f"{name}.jsonl" for name in kept})
    adapters = {name.split("/")[1] for name in needed if name.startswith("policy/")}
    _keep_only(files.policy(0).parent, ADAPTER, adapters)
    _keep_only(files.policy(0).parent, _HALF_WRITTEN, set())


def _forget_after(files: RunFiles, found: Checkpoint, policy: Policy) -> None:
    """Remove what came after a checkpoint, on disk and in memory: its version numbers will be used again."""
    policy.retire_all_but(())
    # Its own manifest may be the one that is damaged: `state.json` is another copy of it.
    older = {path.parent.name for path in files.manifests() if int(path.parent.name) <= found.number}
    older.add(files.checkpoint(found.number).name)
    _keep_only(files.root / "checkpoint", CHECKPOINT, older)
    named = {files.policy(version).name for version in (found.state.policy_version, found.state.best.policy_version)}
    newest = files.policy(found.state.policy_version).name
    adapters = files.policy(0).parent
    _keep_only(adapters, ADAPTER, named | {path.name for path in adapters.glob("policy-*") if path.name < newest})


def _keep_only(folder: Path, pattern: re.Pattern[str], names: set[str]) -> None:
    """Remove what matches `pattern`, except `names`; whatever else lies there is the user's."""
    for entry in folder.glob("*"):
        if pattern.fullmatch(entry.name) and entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
