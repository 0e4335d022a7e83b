"""Which engine a policy gets, and how it is built from the policy's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.policy import ENGINES, VLLMConfig
from fst_optimizer.engines.base import Engine, end_ids
from fst_optimizer.errors import EngineError, UserError, did_you_mean
from fst_optimizer.keys import keep_secret, keep_secrets_of, without_address_secrets
from fst_optimizer.model.load import QUANTIZATIONS

if TYPE_CHECKING:
    from fst_optimizer.engines.vllm.engine import VLLMEngine
    from fst_optimizer.engines.vllm.server import OnWait
    from fst_optimizer.policy.policy import Policy

EngineChoice = str | Callable[["Policy"], Engine]
"""`torch`, `vllm`, or what makes another engine from the policy."""

VLLM_QUANTIZATIONS = {None: None, "nf4": "bitsandbytes"}
"""Our name of a quantization -> vLLM's."""


def check_choice(engine: EngineChoice, url: str | None, vllm: VLLMConfig | None, quantization: str | None) -> None:
    """Raises UserError where the settings that decide about the engine do not fit each other."""
    if not isinstance(engine, str) and not callable(engine):
        raise UserError(f"engine is {engine!r}: give {' or '.join(map(repr, ENGINES))}, or what makes another one")
    if isinstance(engine, str) and engine not in ENGINES:
        raise UserError(f"engine is {engine!r}: {did_you_mean(engine, ENGINES)}")
    if engine != "vllm":
        for name, value in (("url", url), ("vllm", vllm)):
            if value is not None:
                raise UserError(f"{name} is {value!r} and engine is {engine!r}: it is for engine='vllm' alone")
    keep_secrets_of(url)
    if url is not None and "@" in url.partition("://")[2].partition("/")[0]:
        raise UserError(
            f"url is {without_address_secrets(url)!r}, which holds a user or a password: leave it out, a server's key "
            "is api_key (FST_API_KEY for the commands)"
        )
    if url is not None and not url.startswith(("http://", "https://")):
        raise UserError(f"url is {url!r}: give one that starts with http:// or https://")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(f"quantization is {quantization!r}: {did_you_mean(quantization, QUANTIZATIONS)}, or None")


def make_engine(
    policy: Policy, engine: EngineChoice, api_key: str | None, on_wait: OnWait | None, **batching: Any
) -> Engine:
    """The engine of a policy whose model is loaded. The arguments are `Policy`'s, `batching` those of `torch`."""
    if callable(engine):
        return engine(policy)
    if engine == "vllm":
        return _vllm_engine(policy, api_key, on_wait)
    from fst_optimizer.engines.transformers import TransformersEngine

    return TransformersEngine(policy.model, policy.tokenizer, lock=policy.lock, **batching)


def _vllm_engine(policy: Policy, api_key: str | None, on_wait: OnWait | None) -> VLLMEngine:
    """Attached to the server at `policy.url`, or with a server of its own; either way checked against the trainer."""
    from fst_optimizer.engines.vllm.agreement import check_agreement, restart_hint
    from fst_optimizer.engines.vllm.engine import VLLMEngine
    from fst_optimizer.engines.vllm.server import VLLMServer
    from fst_optimizer.model import lora

    keep_secret(api_key)
    config = policy.vllm or VLLMConfig()
    hint = restart_hint(policy.rank, config.max_live_versions, policy.dtype)
    server = None
    if policy.url is None:
        server = VLLMServer(
            policy.folder,
            max_lora_rank=policy.rank,
            config=config,
            dtype=policy.dtype,
            quantization=VLLM_QUANTIZATIONS[policy.quantization],
            trust_remote_code=policy.trust_remote_code,
            on_wait=on_wait,
        )
    engine = None
    try:
        engine = VLLMEngine(
            server=server,
            url=policy.url or "",
            api_key=api_key or "",
            write_adapter=lambda tensors, folder: lora.save_adapter(policy.model, tensors, folder),
            base=policy.zero_adapter,
            end_ids=end_ids(policy.model.get_base_model().generation_config, policy.tokenizer),
            vocabulary=policy.model.get_input_embeddings().weight.shape[0],
            config=config,
        )
        check_agreement(policy, engine, hint)
    except BaseException as error:
        if engine:
            engine.close()
        if server is None and isinstance(error, EngineError):
            raise UserError(f"the vLLM server at {policy.url} cannot be used: {error}; {hint}") from error
        raise
    engine.allow_restarts()
    return engine
