"""Formats of the files that hold settings: their number, and how an older one is read.

A run's `config.json`, the `best.json` of a study and files for `--config` are all read through here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.store.files import read_json

CONFIG_FORMAT = 2
"""Of `config.json`. Format 1 had no number, and a section `guards` for what is `monitors` now."""
GIVEN = "instructions_given"
"""In `program` of a `config.json`: true where the run's instructions are not the task's own."""

RENAMED = {"guards": "monitors"}
"""Section in format 1 -> its name now."""

ELSEWHERE = {
    "learning_rate": "train.lr",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "warmup_ratio": "train.warmup_steps",
    "beta": "train.kl_coef",
    "loss_type": "train.loss",
    "scale_rewards": "train.scale_advantages",
    "epsilon": "train.clip_low",
    "epsilon_high": "train.clip_high",
    "mask_truncated_completions": "train.train_truncated",
    "gradient_accumulation_steps": "train.microbatch_tokens",
    "per_device_train_batch_size": "rollout.batch_size",
    "num_generations": "rollout.group_size",
    "max_completion_length": "policy.max_tokens",
    "max_new_tokens": "policy.max_tokens",
    "num_train_epochs": "budget.max_cycles",
    "max_metric_calls": "fast.max_rollouts",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}
"""Name in TRL, transformers, peft or dspy -> ours, for the remedy of an error."""


def read_config(path: Path) -> dict[str, Any]:
    """A file of settings in the present format, whatever format it was written in.

    Raises:
        UserError: no such file, no JSON, or a newer format.
    """
    data = read_json(path)
    check_format(path, data.get("format", 1), CONFIG_FORMAT)
    return migrated(data)


def migrated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the present format: those under `config` where there is one, as in `config.json`, else all."""
    if "format" in data:
        return dict(data)
    if isinstance(data.get("config"), Mapping):
        return {**data, "config": migrated(data["config"])}
    return {RENAMED.get(name, name): value for name, value in data.items()}


def check_format(path: Path, number: object, newest: int, oldest: int = 1) -> None:
    """This version reads a file of that format.

    Raises:
        UserError: it was written by a newer version, or one too old.
    """
    if not isinstance(number, int) or not oldest <= number <= newest:
        reads = f"{oldest} to {newest}" if oldest < newest else str(newest)
        raise UserError(f"{path}: format {number}, this version reads {reads}; use the fst_optimizer that wrote it")
