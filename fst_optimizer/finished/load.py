"""A finished run, brought back: the program with its instructions, its LM at its policy version."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.arguments import check_path
from fst_optimizer.config.formats import read_config
from fst_optimizer.config.overrides import read_settings, settled
from fst_optimizer.config.policy import ENGINES
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.recorded import (
    RecordedPolicy,
    base_of,
    check_url,
    config_of,
    recorded_policy,
    recorded_task,
    settings_kept,
)
from fst_optimizer.store.files import ADAPTER_TENSORS, RunFiles, checksum, read_json
from fst_optimizer.store.guard import check_links
from fst_optimizer.tasks import load_task
from fst_optimizer.text import shown

KEY_VARIABLE = "FST_API_KEY"
"""The environment variable with the key of a vLLM server to attach to: it is kept out of command lines and files."""

MOST_VERSION = 10**9
METADATA = "metadata"
"""In a program's state: what dspy adds to the predictors."""
ALONE = "self"
"""The name, with dspy, of the one predictor of a program that is itself a `dspy.Predict`."""
OF_A_PREDICTOR = ("traces", "train", "demos", "signature", "fields", "lm")
"""In its state. dspy would set whatever else is there as the predictor's attributes, such as addresses in `config`."""

RESULT: Mapping[str, type] = {"policy_version": int, "task": str, "method": str, "seed": int}
CONFIG: Mapping[str, type] = {"task": str, "policy": dict}
POLICY: Mapping[str, type] = {"model": str, "engine": str, "lora": dict, "seed": int, "max_tokens": int}
"""Entries of `result.json` and `config.json` that a finished run is put together from."""

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left."""

    files: RunFiles
    result: dict[str, Any]
    """Its `result.json`."""
    config: dict[str, Any]
    """Its `config.json`."""

    @property
    def policy(self) -> RecordedPolicy:
        """How the policy was made, by `config.json`."""
        return recorded_policy(self.config, str(self.files.config))

    @property
    def version(self) -> int:
        """The policy version of its best pair; 0 is the base model."""
        number: int = self.result["policy_version"]
        return number

    @property
    def adapter(self) -> Path | None:
        """The LoRA adapter of that version. None for the base model, which has none."""
        return self.files.adapter(self.version) if self.version else None


def read_finished(run_dir: str | Path) -> FinishedRun:
    """A finished run, by its folder.

    Raises:
        UserError: no run there, one that is not finished, one with links, or one whose files are not those that it
            left.
    """
    from fst_optimizer.run.record import check_files

    check_path("run_dir", run_dir)
    files = RunFiles(Path(run_dir))
    check_links(files.root)
    if files.state.exists() and not files.result.exists():
        raise UserError(
            f"run_dir {str(run_dir)!r} holds an unfinished run: finish it first with fst compile ... --resume"
        )
    result = read_json(files.result)
    _check_entries(files.result, result, RESULT)
    version, score = result["policy_version"], result.get("test_score_after")
    if not 0 <= version <= MOST_VERSION:
        raise UserError(f"{files.result}: policy_version is {version!r}, which no run has; is this a run directory?")
    if score is not None and type(score) not in (int, float):
        raise UserError(f"{files.result}: test_score_after is {score!r}, which is no number; is this a run directory?")
    check_files(files, result)
    _check_entries(files.config, read_config(files.config), CONFIG)
    config = config_of(files.config)
    recorded_policy(config, str(files.config))
    _check_entries(files.config, config["policy"], POLICY)
    return FinishedRun(files, result, config)


def _check_entries(path: Path, data: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raises UserError where an entry of a file is missing or of another type."""
    for name, kind in kinds.items():
        if type(data.get(name)) is not kind:
            raise UserError(
                f"{path}: {name} is {shown(data.get(name))}, not {kind.__name__}: the file is damaged, bring it back "
                "from a copy"
            )


def load(
    run_dir: str | Path,
    *,
    program: dspy.Module | None = None,
    task: str | None = None,
    model: str | None = None,
    engine: str | None = None,
    **policy_settings: Any,
) -> dspy.Module:
    """The compiled program of a finished run, its LM attached again.

    The run's files are data: they name no code that runs, no server that is asked and no folder that is read.

    Args:
        run_dir: What `FST(run_dir=...)` or `fst compile --run-dir` left.
        program: A fresh instance of the program. None: built by `task`.
        task: The task that builds the program, `PATH_OR_MODULE[:VARIANT]`. None: the run's own, where it comes with
            this package.
        model: Where the base model is now. None: as the run names it, where that is no folder but a name: one on the
            hub, or `letters`; else the task's own.
        engine: What generates: `torch` or `vllm`. None: what the run used.
        policy_settings: More for `Policy`, e.g. `url` and `api_key` of a vLLM server.

    Raises:
        UserError: the run is not finished, the program cannot be built from its files alone, or is another one.
    """
    import dspy

    from fst_optimizer.program.lms import give_lm

    run = read_finished(run_dir)
    if model is not None:
        check_path("model", model)
    if program is not None and not isinstance(program, dspy.Module):
        raise UserError(f"program is {shown(program)}: give a dspy.Module, a fresh instance of the run's program")
    if task is not None:
        check_path("task", task)
    saved = read_json(run.files.program)
    if program is not None and task is not None:
        raise UserError(f"program and task are both given (task is {task!r}): give one of them")
    own_model = None
    if program is None:
        built_by = recorded_task(run.config, str(run_dir)) if task is None else load_task(str(task))
        program, own_model = built_by.build_program(), built_by.model()
    state = checked_state(saved, program, str(run_dir))
    model = base_of(run.policy, model, own_model)
    policy = load_policy(run.files, run.config, run.version, model, engine, **policy_settings)
    policy.started_from = origin_of(run)
    own_lms = {name: predictor.lm for name, predictor in program.named_predictors()}
    program.load_state(state)
    for name, predictor in program.named_predictors():
        predictor.lm = own_lms[name]
    return give_lm(program, policy.lm_at(run.version))


def checked_state(saved: Mapping[str, Any], program: dspy.Module, run_dir: str) -> dict[str, Any]:
    """What a program's `load_state` takes of a run's `program.json`: texts and demos, no LM and no setting.

    Raises:
        UserError: the program has other predictors than the run's, or lacks an LM that the run's had.
    """
    predictors = dict(program.named_predictors())
    kept = plain_state(saved, run_dir)
    missing, unknown = [name for name in kept if name not in predictors], [n for n in predictors if n not in kept]
    if missing or unknown:
        told = [f"{words} {', '.join(names)}" for words, names in (("lacks", missing), ("adds", unknown)) if names]
        raise UserError(
            f"the program {type(program).__name__} is not that of the run in {run_dir!r}: of its predictors it "
            f"{' and '.join(told)}; give the program, or the task and variant, that the run was made with"
        )
    for name, predictor in predictors.items():
        _check_fields(name, kept[name]["signature"], predictor.signature, run_dir)
        lm = kept[name]["lm"]
        if predictor.lm is None and lm != {}:  # the policy's is written as {}
            which = f" ({str(lm.get('model'))[:100]!r})" if lm else ""
            raise UserError(
                f"predictor {name!r} had an LM of its own in the run in {run_dir!r}{which}, which is not made again "
                "from files, as they could name any server: set it on the program that is given, or in the task's "
                "build_program()"
            )
        kept[name]["lm"] = None
    return as_saved(kept, saved)


def plain_state(saved: Mapping[str, Any], run_dir: str) -> dict[str, dict[str, Any]]:
    """The predictors' states in a `program.json` by their names, with what belongs there alone.

    Raises:
        UserError: a state is not what dspy writes.
    """
    kept = {}
    for name, part in {ALONE: saved}.items() if _is_alone(saved) else saved.items():
        if name == METADATA:
            continue
        whole = isinstance(part, Mapping) and _is_signature(part.get("signature"))
        if not whole or not isinstance(part.get("lm"), Mapping | None) or not _are_demos(part):
            raise UserError(f"program.json of the run in {run_dir!r}: {name!r} is no state of a predictor of dspy")
        kept[name] = {"lm": None, **{key: part[key] for key in OF_A_PREDICTOR if key in part}}
    return kept


def as_saved(state: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """States by predictor, as `saved` has them: those of a program that is one predictor lie open."""
    return dict(state[ALONE] if _is_alone(saved) else state)


def _is_alone(saved: Mapping[str, Any]) -> bool:
    return _is_signature(saved.get("signature"))


def _is_signature(saved: object) -> bool:
    if not isinstance(saved, Mapping) or not isinstance(saved.get("instructions"), str):
        return False
    fields = saved.get("fields")
    return isinstance(fields, list) and all(
        isinstance(field, Mapping) and all(isinstance(field.get(key), str) for key in ("prefix", "description"))
        for field in fields
    )


def _are_demos(part: Mapping[str, Any]) -> bool:
    lists = [part.get(name, []) for name in ("demos", "train", "traces")]
    return all(isinstance(one, list) for one in lists) and all(isinstance(demo, Mapping) for demo in lists[0])


def _check_fields(name: str, saved: Mapping[str, Any], signature: Any, run_dir: str) -> None:
    """`program.json` has the fields' prefixes, no names: another number of them is another program, others may be."""
    before = [field["prefix"] for field in saved["fields"]]
    now = [field.json_schema_extra["prefix"] for field in signature.fields.values()]
    if len(before) != len(now):
        raise UserError(
            f"predictor {name!r} has the fields {', '.join(now)} and had {', '.join(before)} in the run in {run_dir!r}:"
            " give the program, or the task and variant, that the run was made with"
        )
    if before != now:
        logger.warning(
            "predictor %r has the fields %s and had %s in the run: its scores may be others", name, now, before
        )


def load_policy(
    files: RunFiles,
    config: dict[str, Any],
    version: int,
    model: str | None = None,
    engine: str | None = None,
    **settings: Any,
) -> Policy:
    """The policy of a run with this `config.json`, serving `version` and training on from it.

    The run kept that version's adapter, or it is 0, the base. `settings` for `Policy` go over what the run used.
    """
    from fst_optimizer.model.load import check_fingerprint
    from fst_optimizer.model.lora import load_adapter_tensors
    from fst_optimizer.policy.policy import Policy

    made = recorded_policy(config, str(files.config))
    check_url(made, engine, settings.get("url"))
    if engine is None:
        engine = made.engine if made.engine in ENGINES else "torch"
    if engine == "vllm":
        if settings.get("url") is not None:
            settings.setdefault("api_key", os.environ.get(KEY_VARIABLE))
        if "vllm" not in settings:
            settings["vllm"] = settled(FSTConfig(), kept_server_settings(files, ())).vllm
    policy = Policy(
        base_of(made, model),
        lora=made.lora,
        seed=made.seed,
        max_tokens=made.max_tokens,
        chat_template_args=made.chat_template_args,
        engine=engine,
        **settings,
    )
    try:
        check_fingerprint(policy.fingerprint, made.to_dict(), policy.source)
    except UserError:
        policy.close()
        raise
    if version:
        policy.restore(version, load_adapter_tensors(files.adapter(version)))
        policy.move_lm(version)
    return policy


def begin_at(policy: Policy, run: FinishedRun) -> None:
    """Let a new policy begin with the weights of a finished run's best pair, as its version 1; those of the base are 0.

    Raises:
        UserError: the policy is on another base, or its adapter has another shape.
    """
    from fst_optimizer.model.load import check_fingerprint
    from fst_optimizer.model.lora import load_adapter_tensors

    check_fingerprint(policy.fingerprint, run.policy.to_dict(), policy.source)
    policy.started_from = origin_of(run)
    if run.adapter is not None:
        policy.restore(1, load_adapter_tensors(run.adapter))
        policy.move_lm(1)


def origin_of(run: FinishedRun) -> dict[str, Any] | None:
    """What a run says of the finished run whose weights it begins with, with their checksum. None: the base's."""
    if run.adapter is None:
        return None
    weights = checksum(run.adapter / ADAPTER_TENSORS)
    named = {name: run.result[name] for name in ("task", "method", "seed", "policy_version")}
    return {**named, "run_id": run.config.get("run_id"), "adapter_sha256": weights}


def kept_server_settings(files: RunFiles, given: Container[str]) -> dict[str, Any]:
    """The dotted settings of a run's vLLM that are taken over; warns of those that are not, and are not `given`."""
    recorded = read_settings(files.config)
    return settings_kept({name: value for name, value in recorded.items() if name.startswith("vllm.")}, given)
