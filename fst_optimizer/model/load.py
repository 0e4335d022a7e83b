"""A base model and its tokenizer, loaded and checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError, did_you_mean

QUANTIZATIONS = ("nf4",)
BUILT_IN = {"letters": "programs/letters/model", "parcels": "programs/parcels/model"}
"""Name -> folder of the models that come with the package."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@contextmanager
def no_bars() -> Iterator[None]:
    """Transformers shows no progress bars; afterwards it does again, if it did."""
    from transformers.utils import logging as hub_logging

    hub: Any = hub_logging  # its functions carry no types
    shown = hub.is_progress_bar_enabled()
    hub.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hub.enable_progress_bar()


def model_place(model: str | Path) -> str:
    """Where a model is loaded from: a folder, or a hub name (`owner/name`), which is left to the hub.

    A folder with a model in it is taken first. Else a built-in name (`letters`) or a path like `programs/letters/model`
    is looked for beside the installed package, so that both work from anywhere.

    Raises:
        UserError: there is no such folder, or no model in it.
    """
    path, package = Path(model), Path(__file__).parents[1]
    if (path / "config.json").is_file():
        return str(model)
    for root in () if path.is_absolute() else (package, package.parent):
        beside = root / BUILT_IN.get(str(model), str(model))
        if (beside / "config.json").is_file():
            return str(beside)
    if path.is_dir():
        raise UserError(f"model is {str(model)!r}: the folder has no config.json; give a model's own folder")
    if isinstance(model, Path) or path.is_absolute() or str(model).startswith(".") or len(path.parts) != 2:
        raise UserError(
            f"model is {str(model)!r}: no such folder; give a model's folder, a hub name like owner/name, or "
            f"{' or '.join(map(repr, BUILT_IN))}, which are built in"
        )
    return str(model)


def named_place(model: str) -> str | None:
    """Where a model is that a name alone says: one that comes with the package, or one on the hub.

    None for a path, which only the caller may give: the name may come from a file that nobody trusts.
    """
    package = Path(__file__).parents[1]
    for name, beside in BUILT_IN.items():
        for folder in (root / beside for root in (package, package.parent)):
            if (folder / "config.json").is_file() and model in (name, beside, str(folder), str(folder.resolve())):
                return str(folder)
    return model if _HUB_NAME.fullmatch(model) and not Path(model).exists() else None


def path_to_say(model: str) -> str | None:
    """The model's path, where whoever uses a run of it must say it again. None where its name is enough."""
    return None if named_place(model) else model


def check_placement(dtype: str, device: str) -> None:
    """Raises a UserError for a dtype or a device that torch does not have here."""
    import torch

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise UserError(f"dtype is {dtype!r}: {did_you_mean(dtype, ('auto', 'float32', 'bfloat16', 'float16'))}")
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"device is {device!r}: torch cannot use it here ({first}); give 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from error


def load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """A model's tokenizer; a UserError where it cannot be loaded, or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain ones
        raise _unloadable(source, "its tokenizer", error) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"model is {source!r}: its tokenizer has no chat template; take the instruct variant, or add "
            "a chat_template.jinja to the folder"
        )
    return tokenizer


def load_base(source: str, dtype: str, device: str, trust_remote_code: bool, quantization: str | None = None) -> Any:
    """A base model, without adapters; a UserError where it cannot be loaded so. The arguments are those of `Policy`."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_placement(dtype, device)
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("float32" if target == "cpu" else "bfloat16") if dtype == "auto" else dtype
    loading: dict[str, Any] = {"dtype": getattr(torch, kind), "trust_remote_code": trust_remote_code}
    if quantization is not None:
        if target == "cpu" or find_spec("bitsandbytes") is None:
            raise UserError(
                "quantization is 'nf4': it needs a GPU and the package bitsandbytes (pip install bitsandbytes)"
            )
        # QLoRA's 4-bit base: normal-float codes, quantized scales, computing in the model's dtype.
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=loading["dtype"],
        )
        loading["device_map"] = {"": target}
    try:
        # With sizes ignored, tensors of another shape are listed, and refused below by name.
        with no_bars():
            model, found = AutoModelForCausalLM.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **loading
            )
    # Not RuntimeError: memory may run out, which is no fault of the files.
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        raise _unloadable(source, "it", error) from error
    _check_whole(source, found)
    return model if quantization is not None else model.to(target)


def _unloadable(source: str, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"model is {source!r}: {what} could not be loaded ({reason}); see that the name is right and the files whole"
    )


def _check_whole(source: str, found: Mapping[str, Any]) -> None:
    """Raises a UserError where tensors would be filled at random: they are not in the files, or have another shape."""
    shapes = [f"{name} ({tuple(here)}, not {tuple(there)})" for name, here, there in sorted(found["mismatched_keys"])]
    for names, what in ((sorted(found["missing_keys"]), "are not in its files"), (shapes, "have another shape")):
        if names:
            raise UserError(
                f"model is {source!r}: {some(names)} {what}, and would be filled at random; get the files of the whole "
                "model again, config.json and weights of one model"
            )


def some(names: Sequence[str], shown: int = 3) -> str:
    """`2 tensors (a, b)`, and no more names than are shown."""
    more = f", ... and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:shown])}{more})"


def check_tokenizer(source: str, tokenizer: Any, model: Any) -> None:
    """Raises a UserError where the tokenizer has tokens that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model is {source!r}: its tokenizer has {len(tokenizer)} tokens and its embedding only {rows} rows; "
            "they are not of one model"
        )


def fingerprint(base: Any) -> str:
    """A hash of a few values of every tensor of a model, the same on every device and in every dtype."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        few = tensor.detach().flatten()[:64].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(found: str, made: Mapping[str, Any], source: str) -> None:
    """Raises a UserError for another model than a run was made with; `made` is `policy` in the run's config.json."""
    if found != (made.get("fingerprint") or found):
        raise UserError(
            f"the model in {source!r} is not the one that the run was made with ({made['model']!r} then): its "
            "adapters mean nothing on other weights; name the right model's folder"
        )
