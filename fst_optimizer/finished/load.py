"""A finished run, brought back: the program with its instructions, its LM at its policy version."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.arguments import check_path
from fst_optimizer.config.formats import read_config
from fst_optimizer.config.policy import ENGINES, LoraConfig, VLLMConfig
from fst_optimizer.errors import UserError
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.tasks import load_task
from fst_optimizer.text import shown

KEY_VARIABLE = "FST_API_KEY"
"""The environment variable with the key of a vLLM server to attach to: it is kept out of command lines and files."""

METADATA, LM_CLASS, DSPY_LM = "metadata", "_dspy_lm_class", "dspy.clients.lm.LM"
"""In a program's state: what dspy adds to the predictors, where an LM names its class, and dspy's own."""

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
    def policy(self) -> dict[str, Any]:
        """How the policy was made, by `config.json`."""
        made: dict[str, Any] = self.config["policy"]
        return made

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
        UserError: no run there, one that is not finished, or one whose files are not those that it left.
    """
    from fst_optimizer.run.record import check_files

    check_path("run_dir", run_dir)
    files = RunFiles(Path(run_dir))
    if files.state.exists() and not files.result.exists():
        raise UserError(
            f"run_dir {str(run_dir)!r} holds an unfinished run: finish it first with fst compile ... --resume"
        )
    result = read_json(files.result)
    _check_entries(files.result, result, RESULT)
    check_files(files, result)
    config = read_config(files.config)
    _check_entries(files.config, config, CONFIG)
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
    model: str | None = None,
    engine: str | None = None,
    **policy_settings: Any,
) -> dspy.Module:
    """The compiled program of a finished run, its LM attached again.

    Args:
        run_dir: What `FST(run_dir=...)` or `fst compile --run-dir` left.
        program: A fresh instance of the program. None: built by the run's task, for runs of a task.
        model: Where the base model is now. None: where it was.
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
    saved = read_json(run.files.program)
    if program is None:
        task = run.config["task"]
        try:
            program = load_task(task).build_program()
        except UserError as error:
            raise UserError(
                f"run_dir {str(run_dir)!r} is a run of {task!r}, which is no task that can be built here: "
                "pass program=, a fresh instance of your program"
            ) from error
    state = checked_state(saved, program, str(run_dir))
    policy = load_policy(run.files, run.config, run.version, model, engine, **policy_settings)
    own_lms = {name: predictor.lm for name, predictor in program.named_predictors()}
    program.load_state(state)
    for name, predictor in program.named_predictors():
        # What was saved of an LM lacks its key and its address.
        predictor.lm = own_lms[name] or predictor.lm
    return give_lm(program, policy.lm_at(run.version))


def checked_state(saved: Mapping[str, Any], program: dspy.Module, run_dir: str) -> dict[str, Any]:
    """What a program's `load_state` takes of a run's `program.json`, without the LMs that `program` has itself.

    Raises:
        UserError: the program has other predictors than the run's, or lacks an LM that no file can bring back.
    """
    predictors = dict(program.named_predictors())
    kept = {name: dict(part) for name, part in saved.items() if name != METADATA}
    missing, unknown = [name for name in kept if name not in predictors], [n for n in predictors if n not in kept]
    if missing or unknown:
        told = [f"{words} {', '.join(names)}" for words, names in (("lacks", missing), ("adds", unknown)) if names]
        raise UserError(
            f"the program {type(program).__name__} is not that of the run in {run_dir!r}: of its predictors it "
            f"{' and '.join(told)}; give the program, or the task and variant, that the run was made with"
        )
    for name, predictor in predictors.items():
        _check_fields(name, kept[name]["signature"], predictor.signature, run_dir)
        if predictor.lm is not None:
            kept[name]["lm"] = None
        elif kept[name]["lm"] is None or kept[name]["lm"].get(LM_CLASS, DSPY_LM) != DSPY_LM:
            which = f" ({kept[name]['lm'][LM_CLASS]})" if kept[name]["lm"] else ""
            raise UserError(
                f"predictor {name!r} had an LM of its own in the run in {run_dir!r}{which}, which cannot be made again "
                "from files: set it on the program that is given, or in the task's build_program()"
            )
    return kept


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

    made = config["policy"]
    if engine is None:
        engine = made["engine"] if made["engine"] in ENGINES else "torch"
    if engine == "vllm":
        settings.setdefault("url", made.get("url"))
        if settings["url"] is not None:
            settings.setdefault("api_key", os.environ.get(KEY_VARIABLE))
        settings.setdefault("vllm", VLLMConfig(**made["vllm"]) if made.get("vllm") else None)
    policy = Policy(
        model or made["model"],
        lora=LoraConfig(**made["lora"]),
        seed=made["seed"],
        max_tokens=made["max_tokens"],
        chat_template_args=made["chat_template_args"],
        engine=engine,
        **settings,
    )
    try:
        check_fingerprint(policy.fingerprint, made, policy.source)
    except UserError:
        policy.close()
        raise
    if version:
        policy.restore(version, load_adapter_tensors(files.adapter(version)))
        policy.move_lm(version)
    return policy
