"""A run's LoRA adapter, written anew for other programs: its tensors, and of its settings those that make them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.finished.recorded import MOST_ALPHA, MOST_RANK
from fst_optimizer.store.files import ADAPTER_CONFIG, ADAPTER_TENSORS, read_json, write_json

ADAPTER = "adapter"
"""The folder's name."""
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


def write_adapter(saved: Path, folder: Path, base: str) -> int:
    """Write the adapter in `saved` to a new `folder`, for the model `base`; its rank.

    peft imports a module that `auto_mapping` in an adapter's settings names. So nothing is taken over of them but
    numbers, switches and the names of layers.

    Raises:
        UserError: it is no plain LoRA adapter.
    """
    settings = _plain(read_json(saved / ADAPTER_CONFIG), saved)
    folder.mkdir(parents=True)
    shutil.copyfile(saved / ADAPTER_TENSORS, folder / ADAPTER_TENSORS, follow_symlinks=False)
    write_json(folder / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": base})
    rank: int = settings["r"]
    return rank


def _plain(saved: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    rank, alpha, dropout = saved.get("r", 0), saved.get("lora_alpha", 0), saved.get("lora_dropout", 0.0)
    extras = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    plain = (
        saved.get("peft_type") == "LORA"
        and type(rank) is int
        and 1 <= rank <= MOST_RANK
        and type(alpha) in (int, float)
        and 0 < alpha <= MOST_ALPHA
        and type(dropout) in (int, float)
        and 0 <= dropout < 1
        and not any(saved.get(name) for name in extras)
        and saved.get("bias", "none") == "none"
    )
    if not plain:
        raise UserError(f"{folder}: its {ADAPTER_CONFIG} is not that of plain LoRA: bring it back from a copy")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": saved.get("use_rslora") is True,
        "fan_in_fan_out": saved.get("fan_in_fan_out") is True,
        "target_modules": _targets(saved, folder),
    }


def _targets(saved: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of layers; where they were chosen by a pattern or by number, those that have tensors."""
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_TENSORS
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read ({error}): bring it back from a copy, or train again") from error
    if not names or not all(name.startswith(_PREFIX) and name.endswith(_ENDS) for name in names):
        raise UserError(f"{path}: its tensors are not those of a plain LoRA adapter: bring it back from a copy")
    targets = saved.get("target_modules")
    listed = isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)
    if listed and not saved.get("layers_to_transform"):
        return sorted(targets or ())
    return sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in names})
