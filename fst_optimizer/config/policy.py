"""Settings of a policy: its adapter's shape, and how a vLLM server is run for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, field_validator

from fst_optimizer.config.section import Remedy, Section
from fst_optimizer.errors import UserError

ENGINES = ("torch", "vllm")
"""What can generate: the model in this process, or a vLLM server."""
PathText = Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
NumberText = BeforeValidator(lambda value: str(value) if type(value) is int else value)
"""For text that may look like a number: on a command line, 1 is given without quotes."""
S = TypeVar("S", bound=Section)
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # JSON has lists, no tuples


class LoraConfig(Section, section="lora"):
    """The shape of the trainable adapter."""

    rank: int = Field(default=16, ge=1)
    """r. vLLM serves 1, 8, 16, 32, 64, 128, 256, 320 and 512."""
    alpha: int = Field(default=32, ge=1)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs dropped in training. Above 0, trainer and sampler disagree by design."""
    target_modules: Annotated[Strings | None, Remedy('give a list of names, e.g. ["q_proj", "v_proj"]')] = Field(
        default=None, min_length=1
    )
    """Names of the linear layers that get an adapter. None: all but the output head."""


class VLLMConfig(Section, section="vllm"):
    """How a vLLM server is started, placed and spoken to. Nothing here changes what is sampled."""

    gpu_memory_utilization: Annotated[float | None, Remedy("give a share of at most 1, and above 0")] = Field(
        default=None, gt=0, le=1
    )
    """Share of each GPU's memory that vLLM takes. None: 0.45 beside the trainer, 0.9 on GPUs of its own."""
    devices: Annotated[str | None, NumberText] = None
    """CUDA_VISIBLE_DEVICES of the server, e.g. "1" or "1,2". None: the same GPUs as the trainer."""
    max_live_versions: int = Field(default=4, ge=3)
    """Policy versions besides the base that are served at once; each takes an adapter's memory in vLLM."""
    max_in_flight: int = Field(default=256, ge=1)
    """Requests that the server is given at once; the others wait here."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and completion together. None: the model's own."""
    cpu_kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for the KV cache where vLLM runs on CPU, in GiB."""
    cpu_threads: Annotated[str, NumberText] = "auto"
    """VLLM_CPU_OMP_THREADS_BIND: "auto" leaves a core to the server's front and to the programs; "0-3" names cores."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """How long a start may take, in seconds; large models are read from disk in it."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """After how many seconds without an answer a request counts as lost to overload."""
    adapter_dir: PathText = None
    """Where adapters are written for the server to read. None: a temporary folder; a server on another machine needs a
    folder that both see under one path."""
    log_file: PathText = None
    """Where a server that is started here writes its log. None: a temporary folder."""
    flags: Annotated[Strings, Remedy('give a list of strings, e.g. ["--enforce-eager"]')] = ()
    """More flags for `vllm serve`, e.g. ("--enforce-eager", "--tensor-parallel-size=2"). They win over the others."""

    @field_validator("flags")
    @classmethod
    def _holds_no_key(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        # As vLLM reads them: with an underscore, or no longer than needed.
        if any(flag.replace("_", "-").startswith("--api-k") for flag in flags):
            raise UserError("vllm.flags is '--api-key=...': give api_key instead, which is kept out of all files")
        return flags


def settings_of(section: type[S], value: object) -> S:
    """Settings given as such, or as a mapping of their names. Raises UserError for anything else."""
    if isinstance(value, section):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return section(**value)
    raise UserError(f"{section.section} is {value!r}: give a {section.__name__}, or a dictionary of its settings")


class PolicyArguments(Section):
    """Numbers and names among the arguments of `Policy`, which documents them."""

    seed: int = Field(ge=0, lt=2**31)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    trust_remote_code: bool
    max_batch: int = Field(ge=1)
    max_batch_tokens: int = Field(ge=1)
    max_wait_s: float = Field(ge=0)
    dtype: str
    device: str
    url: str | None
    quantization: str | None
    chat_template_args: Annotated[
        Mapping[str, Any] | None, Remedy('give an object of names, e.g. {"enable_thinking": false}')
    ]


class PolicyConfig(Section, section="policy"):
    """What a policy is given besides its model and its adapter's shape."""

    max_tokens: int = Field(default=512, ge=1)
    """Most new tokens of a call that does not say."""
