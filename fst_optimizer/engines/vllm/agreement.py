"""Whether a vLLM server and the trainer agree, checked once before anything is spent.

A short completion is sampled from the base and from a random adapter, and its log-probs are computed again by the
trainer. That finds what no endpoint tells: raw log-probs in place of processed ones, another base model, an adapter
that is not applied as the trainer applies it. It also warms the server up: its first requests take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fst_optimizer.engines.base import GenerationRequest, sampled_call
from fst_optimizer.engines.vllm.installed import served_rank
from fst_optimizer.engines.vllm.server import EXTRA_ADAPTERS
from fst_optimizer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.engines.vllm.engine import VLLMEngine
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.types import Call

TEMPERATURE = 0.5
"""Far enough from 1 that raw and processed log-probs differ."""
TOLERANCE = {"float32": 1e-2}
"""Largest mean difference of a token's log-prob that passes, in nats, by dtype."""
LOOSE_TOLERANCE = 0.1
"""For half precision, where vLLM's kernels and transformers' round differently."""
TOKENS = 8


def restart_hint(rank: int, max_live_versions: int, dtype: str) -> str:
    """The remedy: what a server must be started with to serve adapters of this rank."""
    return (
        f"restart it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora "
        f"--max-lora-rank {served_rank(rank)} --max-loras {max_live_versions + EXTRA_ADAPTERS} "
        f"--logprobs-mode processed_logprobs --generation-config vllm --dtype {dtype} --api-key KEY"
        " (on CPU, add --no-enable-chunked-prefill)"
    )


def check_agreement(policy: Policy, engine: VLLMEngine, hint: str) -> None:
    """Sample from base and adapter, and compare with the trainer.

    Raises:
        UserError: they differ; the text ends with `hint`, how to restart the server.
        EngineError: the server does not answer as it should.
    """
    prompt_ids = policy.encode_chat([{"role": "user", "content": "Write a short list of words."}])
    request = GenerationRequest(prompt_ids, TOKENS, temperature=TEMPERATURE, seed=1)
    for tensors in (None, random_adapter(policy.zero_adapter)):
        generation = engine.submit(request).result() if tensors is None else engine.try_adapter(tensors, request)
        call = sampled_call(request, generation)
        difference = _difference(policy, call, tensors)
        if difference <= TOLERANCE.get(policy.dtype, LOOSE_TOLERANCE):
            continue
        if _difference(policy, replace(call, temperature=1.0), tensors) < difference / 10:
            raise UserError(
                f"the vLLM server gives log-probs as they were before the temperature (raw_logprobs): {hint}"
            )
        what = "serves another base model, or in another dtype" if tensors is None else "applies adapters otherwise"
        raise UserError(
            f"the vLLM server's log-probs are {difference:.3g} nats a token from the trainer's: it {what} than "
            f"{policy.source!r} here; {hint}"
        )


def _difference(policy: Policy, call: Call, tensors: Mapping[str, Tensor] | None) -> float:
    """Mean absolute difference between the server's log-probs and the trainer's, in nats a token."""
    if max(call.completion_ids) >= policy.model.get_input_embeddings().weight.shape[0]:
        return float("inf")
    (ours,) = policy.logprobs_of([call], tensors)
    return sum(abs(a - b) for a, b in zip(ours, call.logprobs, strict=True)) / len(ours)


def random_adapter(zero_adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter that moves the policy a little: one whose B is zero would agree however it is applied."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in zero_adapter.items():
        if ".lora_B." in name:
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor = noise.to(tensor.device, tensor.dtype)
        tensors[name] = tensor
    return tensors
