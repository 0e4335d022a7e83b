"""Whether a vLLM server and the trainer agree, asked once before anything is spent.

A short completion is sampled from the base and from a random adapter, and its log-probs are computed again by the
trainer. That finds what no endpoint tells: raw log-probs in place of processed ones, another base model, an adapter
that is not applied as the trainer applies it. It also warms the server up: its first requests take seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.engines.vllm.server import EXTRA_ADAPTERS, served_rank
from fst_optimizer.errors import UserError
from fst_optimizer.types import Call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fst_optimizer.engines.vllm.engine import VLLMEngine
    from fst_optimizer.policy.policy import Policy

TEMPERATURE = 0.5
"""Far enough from 1 that raw and processed log-probs differ."""
TOLERANCE = {"float32": 1e-2}
"""Largest mean difference of a token's log-prob that passes, in nats, by dtype."""
LOOSE_TOLERANCE = 0.1
"""For half precision, where vLLM's kernels and transformers' round differently."""
TOKENS = 8
RESTART = (
    "restart it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank {rank} "
    "--max-loras {loras} --logprobs-mode processed_logprobs --generation-config vllm --dtype {dtype} --api-key KEY"
    " (on CPU, add --no-enable-chunked-prefill)"
)


def check_agreement(policy: Policy, engine: VLLMEngine) -> None:
    """Sample from base and adapter, and compare with the trainer.

    Raises:
        UserError: they differ; the text says how to restart the server.
        EngineError: the server does not answer as it should.
    """
    prompt_ids = policy.encode_chat([{"role": "user", "content": "Write a short list of words."}])
    request = GenerationRequest(prompt_ids, TOKENS, temperature=TEMPERATURE, seed=1)
    _compare(policy, request, engine.submit(request).result(), None)
    tensors = _random_adapter(policy)
    _compare(policy, request, engine.try_adapter(tensors, request), tensors)


def restart(policy: Policy) -> str:
    """What a server must be started with to serve this policy."""
    return RESTART.format(
        rank=served_rank(policy.rank),
        loras=(policy.vllm or VLLMConfig()).max_live_versions + EXTRA_ADAPTERS,
        dtype=_dtype(policy),
    )


def _dtype(policy: Policy) -> str:
    return str(policy.model.dtype).removeprefix("torch.")


def _compare(
    policy: Policy,
    request: GenerationRequest,
    generation: Generation,
    tensors: Mapping[str, Tensor] | None,
) -> None:
    far = _distance(policy, request, generation, tensors)
    if far <= TOLERANCE.get(_dtype(policy), LOOSE_TOLERANCE):
        return
    raw = _distance(policy, replace(request, temperature=1.0), generation, tensors)
    if raw < far / 10:
        raise UserError(
            f"the vLLM server gives log-probs as they were before the temperature (raw_logprobs): {restart(policy)}"
        )
    what = "serves another base model, or in another dtype" if tensors is None else "applies adapters otherwise"
    raise UserError(
        f"the vLLM server's log-probs are {far:.3g} nats a token from the trainer's: it {what} than "
        f"{policy.source!r} here; {restart(policy)}"
    )


def _distance(
    policy: Policy, request: GenerationRequest, generation: Generation, tensors: Mapping[str, Tensor] | None
) -> float:
    """Mean absolute difference between the server's log-probs and the trainer's, in nats a token."""
    if max(generation.completion_ids) >= policy.model.get_input_embeddings().weight.shape[0]:
        return float("inf")
    call = Call("", request.prompt_ids, generation.completion_ids, generation.logprobs, request.temperature, 0, "stop")
    ours = policy.logprobs_of([call], tensors)[0]
    return sum(abs(a - b) for a, b in zip(ours, generation.logprobs, strict=True)) / len(ours)


def _random_adapter(policy: Policy) -> dict[str, Tensor]:
    """An adapter that moves the policy a little: one whose B is zero would agree however it is applied."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in policy.zero_adapter.items():
        if ".lora_B." in name:
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor = noise.to(tensor.device, tensor.dtype)
        tensors[name] = tensor
    return tensors
