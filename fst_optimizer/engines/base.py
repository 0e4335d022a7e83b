"""What an engine is: token ids in, token ids and log-probs out, for any policy version that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to sample."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    """Most new tokens, the end-of-turn token included."""
    temperature: float = 1.0
    """0: greedy. Nothing else shapes the distribution: no top_p, no top_k, no penalties."""
    stop: tuple[str, ...] = ()
    """Strings after which the completion ends; they stay in the tokens and are cut from the text."""
    seed: int = 0
    """Decides the sampled tokens, whatever else is in the batch."""
    version: int = 0
    """The policy version to sample from; 0 is the base."""


@dataclass(frozen=True)
class Generation:
    """What was sampled."""

    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each token at the request's temperature (at 1 when greedy), in nats."""
    finish_reason: str
    """`stop` or `length`."""


class Engine(Protocol):
    """A generator of policy versions. Every method may be called from any thread."""

    context_length: int
    """Most tokens of prompt and completion together."""

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """Queue a request. A cancelled future is skipped if it has not started.

        Raises (from the future): RetiredVersion, EngineError.
        """
        ...

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Serve `version` from now on, made of these LoRA tensors. Immutable once published."""
        ...

    def retire(self, version: int) -> None:
        """Stop serving `version`. Later requests for it raise RetiredVersion."""
        ...

    def versions(self) -> frozenset[int]:
        """The versions served now; 0, the base, always among them."""
        ...

    def close(self) -> None:
        """Stop. Queued requests fail with EngineError."""
        ...
