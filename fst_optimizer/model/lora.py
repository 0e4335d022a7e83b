"""The LoRA adapters on one peft model: `default` trains, the others are immutable policy versions.

One base model serves and trains, so switching adapters is a matter of names. peft's `set_adapter` makes whatever it
activates trainable, and adding an adapter draws from the global RNG: both are undone here, nowhere else.

Adapter tensors travel as `dict[str, Tensor]` under peft's file names (`base_model.model...lora_A.weight`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import UserError
from fst_optimizer.model.load import some
from fst_optimizer.store.files import ADAPTER_CONFIG, ADAPTER_TENSORS, read_json, sync, writing
from fst_optimizer.store.folders import temporary_folder

TRAINED = "default"
"""The adapter that trains. peft saves any other name into a subfolder, where vLLM does not look."""


def attach(base_model: Any, shape: LoraConfig | None = None, *, seed: int = 0) -> PeftModel:
    """A fresh trainable LoRA adapter (B = 0, so the policy is the base) on `base_model`, in evaluation mode.

    The same seed gives the same matrices, and the global RNG is left where it was.
    """
    config = _peft_config(base_model, shape or LoraConfig())
    with seeded(seed):
        model: PeftModel = peft.get_peft_model(base_model, config)
    model.eval()
    return model


def replace_trained(model: PeftModel, shape: LoraConfig, *, seed: int = 0) -> None:
    """Puts a fresh trained adapter, maybe of another shape, in the place of the old one: what `attach` would make.

    The other versions must be gone: they have the old shape. Hold the model's lock.
    """
    assert set(model.peft_config) == {TRAINED}, sorted(model.peft_config)
    config = _peft_config(model.get_base_model(), shape)
    model.delete_adapter(TRAINED)
    with seeded(seed):
        model.add_adapter(TRAINED, config)
    model.set_adapter(TRAINED)
    model.eval()


def _peft_config(base_model: Any, shape: LoraConfig) -> peft.LoraConfig:
    targets = list(shape.target_modules or ())
    if not targets:
        # The last names (`q_proj`) of all linear layers but the head: peft's "all-linear" would list every path.
        head = base_model.get_output_embeddings()
        layers = base_model.named_modules()
        linear = [name for name, layer in layers if isinstance(layer, nn.Linear) and layer is not head]
        # Where adapters are on the model already, they have linear layers of their own; the model's are inside them.
        own = (name.removesuffix(".base_layer") for name in linear if ".lora_" not in name)
        targets = sorted({name.rsplit(".", 1)[-1] for name in own})
    return peft.LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, random numbers of the CPU and of this GPU follow from the seed; afterwards they are where they were."""
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed, which would reseed every GPU.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def attach_from(base_model: Any, folder: str | Path) -> PeftModel:
    """The LoRA adapter saved in `folder`, trainable, on `base_model`, in evaluation mode.

    Raises:
        UserError: `folder` holds no plain LoRA adapter on linear layers, a damaged one, or one of another model.
    """
    check_plain(folder)
    tensors = load_adapter_tensors(folder)
    # Not PeftModel.from_pretrained, which leaves what the file lacks as it was drawn, and says so in a warning alone.
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode, config.init_lora_weights = False, True
        with torch.random.fork_rng(devices=[]):
            model: PeftModel = peft.get_peft_model(base_model, config)
        restore(model, tensors)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(
            f"adapter is {str(folder)!r}: {error}; give the whole folder of an adapter of this model"
        ) from error
    model.eval()
    return model


def trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable adapter's own parameters (not copies) under their file names."""
    marker = f".{TRAINED}."
    return {name.replace(marker, "."): p for name, p in model.named_parameters() if "lora_" in name and marker in name}


def snapshot(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the trained adapter's tensors, which later steps do not change."""
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}


def zeroed(model: PeftModel) -> dict[str, Tensor]:
    """The trained adapter's tensors as they are now, its B matrices zero: the base."""
    return {name: tensor.zero_() if ".lora_B." in name else tensor for name, tensor in snapshot(model).items()}


def restore(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` into the trained adapter, in place: an optimizer that holds its parameters goes on."""
    parameters = trained_parameters(model)
    if parameters.keys() != tensors.keys():
        missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
        wrong = [f"{some(names)} {what}" for names, what in ((missing, "missing"), (extra, "unknown")) if names]
        raise UserError(f"the adapter's tensors do not fit the model: {' and '.join(wrong)}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(parameter.shape)
            raise UserError(f"the adapter's {name} is {have}, the policy's {want}: keep lora.rank as it was")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether these are the same weights, wherever they lie."""
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def add_version(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Adds a frozen adapter `name` with copies of `tensors`, from memory; the trained one stays active."""
    config = copy.copy(model.peft_config[TRAINED])
    config.inference_mode = True
    # On the meta device, initialising costs nothing and draws nothing from the global RNG.
    model.add_adapter(name, config, low_cpu_mem_usage=True)
    device = next(iter(trained_parameters(model).values())).device
    copies = {key: tensor.detach().to(device, copy=True) for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, copies, adapter_name=name, low_cpu_mem_usage=True)
    model.set_adapter(TRAINED)
    model.train(model.training)  # the new adapter's dropout is a new module, in training mode


def drop_version(model: PeftModel, name: str) -> None:
    """Removes the adapter `name`; the trained one stays active."""
    model.delete_adapter(name)
    model.set_adapter(TRAINED)


@contextmanager
def temporary_adapter(model: PeftModel, tensors: Mapping[str, Tensor] | None) -> Iterator[str | None]:
    """These tensors as a version of the model for as long as this lasts: its name, or None for the base.

    Not thread-safe: hold the model's lock.
    """
    if tensors is None:
        yield None
        return
    add_version(model, "temporary", tensors)
    try:
        yield "temporary"
    finally:
        drop_version(model, "temporary")


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[PeftModel]:
    """The model as policy version `name`, or as the base when None; afterwards the trained adapter is active again.

    For inference: inside, nothing requires a gradient. Not thread-safe: hold the model's lock.
    """
    try:
        if name is None:
            model.base_model.disable_adapter_layers()
        else:
            model.set_adapter(name, inference_mode=True)
        yield model
    finally:
        if name is None:
            model.base_model.enable_adapter_layers()
        model.set_adapter(TRAINED)


def save_adapter(model: PeftModel, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`, all or nothing.

    The files are what `PeftModel.from_pretrained` and vLLM load. An existing folder is replaced.

    Raises:
        StorageError: they could not be written.
    """
    folder = Path(folder)
    config = copy.copy(model.peft_config[TRAINED])
    config.inference_mode = True
    with writing(folder), temporary_folder(f".{folder.name}.", folder.parent) as temporary:
        written = Path(temporary, "new")
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules or ())  # a set, in another order in each process
        config.save_pretrained(str(written))
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, written / ADAPTER_TENSORS, metadata={"format": "pt"})
        for path in (written / ADAPTER_CONFIG, written / ADAPTER_TENSORS, written):
            sync(path)
        if folder.exists():
            # A rename cannot replace a folder that holds files.
            os.replace(folder, Path(temporary, "old"))
        os.replace(written, folder)
        sync(folder.parent)


def load_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors that `save_adapter` wrote, on the CPU.

    Raises:
        UserError: the file is missing, or damaged.
    """
    path = Path(folder) / ADAPTER_TENSORS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read ({error}): bring it back from a copy, or train again") from error


def check_plain(path: str | Path) -> None:
    """Raises a UserError for a folder without a plain LoRA adapter on linear layers."""
    folder = Path(path)
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"adapter is {str(folder)!r}: no {name} there; give a LoRA folder that peft saved")
    config = read_json(folder / ADAPTER_CONFIG)
    targets = config.get("target_modules") or []
    extras = [name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(name)]
    extras += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    extras += [f"target {t}" for t in targets if t in ("lm_head", "embed_tokens")] if isinstance(targets, list) else []
    if config.get("peft_type") != "LORA" or extras:
        raise UserError(
            f"adapter is {str(folder)!r}: not plain LoRA on linear layers "
            f"({config.get('peft_type')} {', '.join(extras)}): merge it into the base model first"
        )
