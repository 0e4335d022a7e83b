"""Whether a vLLM server and the trainer agree, checked once before anything is spent.

A short completion is sampled from the base and from a random adapter, and its log-probs are computed again by the
trainer. That finds what no endpoint tells: raw log-probs in place of processed ones, another base model, an adapter
that is not applied as the trainer applies it. It also warms the server up: its first requests take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.engines.vllm.installed import served_rank
from fst_optimizer.engines.vllm.server import EXTRA_ADAPTERS
from fst_optimizer.errors import UserError
from fst_optimizer.types import Call

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

TEMPERATURE = 0.5
"""Far enough from 1 that raw and processed log-probs differ."""
TOLERANCE = {"float32": 1e-2}
"""Largest mean difference of a token's log-prob that passes, in nats, by dtype."""
LOOSE_TOLERANCE = 0.1
"""For half precision, where vLLM's kernels and transformers' round differently."""
TOKENS = 8


@dataclass(frozen=True)
class Probe:
    """What is asked of the server and of the trainer, and how the user is told of a difference."""

    prompt_ids: tuple[int, ...]
    zero_adapter: Tensors
    """LoRA tensors that add nothing to the base."""
    sample: Callable[[GenerationRequest, Tensors | None], Generation]
    """The server samples from these LoRA tensors, or from the base."""
    logprobs: Callable[[Sequence[Call], Tensors | None], list[list[float]]]
    """The trainer's log-probs of the calls' tokens under these LoRA tensors, or under the base."""
    model: str
    dtype: str
    vocabulary: int
    """Token ids that the trainer's model knows."""
    restart_hint: str


def restart_hint(rank: int, max_live_versions: int, dtype: str) -> str:
    """The remedy: what a server must be started with to serve adapters of this rank."""
    return (
        f"restart it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora "
        f"--max-lora-rank {served_rank(rank)} --max-loras {max_live_versions + EXTRA_ADAPTERS} "
        f"--logprobs-mode processed_logprobs --generation-config vllm --dtype {dtype} --api-key KEY"
        " (on CPU, add --no-enable-chunked-prefill)"
    )


def check_agreement(probe: Probe) -> None:
    """Sample from base and adapter, and compare with the trainer.

    Raises:
        UserError: they differ; the text says how to restart the server.
        EngineError: the server does not answer as it should.
    """
    request = GenerationRequest(probe.prompt_ids, TOKENS, temperature=TEMPERATURE, seed=1)
    for tensors in (None, random_adapter(probe.zero_adapter)):
        _compare(probe, request, tensors)


def _compare(probe: Probe, request: GenerationRequest, tensors: Tensors | None) -> None:
    generation = probe.sample(request, tensors)
    difference = _difference(probe, request, generation, tensors)
    if difference <= TOLERANCE.get(probe.dtype, LOOSE_TOLERANCE):
        return
    if _difference(probe, replace(request, temperature=1.0), generation, tensors) < difference / 10:
        raise UserError(
            f"the vLLM server gives log-probs as they were before the temperature (raw_logprobs): {probe.restart_hint}"
        )
    what = "serves another base model, or in another dtype" if tensors is None else "applies adapters otherwise"
    raise UserError(
        f"the vLLM server's log-probs are {difference:.3g} nats a token from the trainer's: it {what} than "
        f"{probe.model!r} here; {probe.restart_hint}"
    )


def _difference(probe: Probe, request: GenerationRequest, generation: Generation, tensors: Tensors | None) -> float:
    """Mean absolute difference between the server's log-probs and the trainer's, in nats a token."""
    if max(generation.completion_ids) >= probe.vocabulary:
        return float("inf")
    call = Call("", request.prompt_ids, generation.completion_ids, generation.logprobs, request.temperature, 0, "stop")
    (ours,) = probe.logprobs([call], tensors)
    return sum(abs(a - b) for a, b in zip(ours, generation.logprobs, strict=True)) / len(ours)


def random_adapter(zero_adapter: Tensors) -> dict[str, Tensor]:
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
