"""A finished run, brought back: the program with its instructions, its LM at its policy version."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.policy import ENGINES, LoraConfig, VLLMConfig
from fst_optimizer.errors import UserError
from fst_optimizer.run.record import check_files
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.tasks import load_task

KEY_VARIABLE = "FST_API_KEY"
"""The environment variable with the key of a vLLM server to attach to: it is kept out of command lines and files."""

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
    files = RunFiles(Path(run_dir))
    if files.state.exists() and not files.result.exists():
        raise UserError(
            f"run_dir {str(run_dir)!r} holds an unfinished run: finish it first with fst compile ... --resume"
        )
    result = read_json(files.result)
    check_files(files, result)
    return FinishedRun(files, result, read_config(files.config))


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
        UserError: the run is not finished, or the program cannot be built from its files alone.
    """
    from fst_optimizer.program.lms import give_lm

    run = read_finished(run_dir)
    if program is None:
        task = run.config["task"]
        try:
            program = load_task(task).build_program()
        except UserError as error:
            raise UserError(
                f"run_dir {str(run_dir)!r} is a run of {task!r}, which is no task that can be built here: "
                "pass program=, a fresh instance of your program"
            ) from error
    policy = load_policy(run.files, run.config, run.version, model, engine, **policy_settings)
    own_lms = {name: predictor.lm for name, predictor in program.named_predictors()}
    program.load(str(run.files.program))
    for name, predictor in program.named_predictors():
        # What was saved of an LM lacks its key and its address.
        predictor.lm = own_lms[name] or predictor.lm
    return give_lm(program, policy.lm_at(run.version))


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
    engine = engine or (made["engine"] if made["engine"] in ENGINES else "torch")
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
