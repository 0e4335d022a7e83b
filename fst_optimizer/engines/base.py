"""What an engine is: token ids in, token ids and log-probs out, for any policy version that it serves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fst_optimizer.errors import EngineError, RetiredVersion
from fst_optimizer.types import Call

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


def sampled_call(request: GenerationRequest, generation: Generation, predictor: str = "", text: str = "") -> Call:
    """What was sampled for a request, as it is recorded and trained on."""
    return Call(
        predictor=predictor,
        prompt_ids=request.prompt_ids,
        completion_ids=generation.completion_ids,
        logprobs=generation.logprobs,
        temperature=request.temperature,
        policy_version=request.version,
        finish_reason=generation.finish_reason,
        text=text,
    )


class Engine(Protocol):
    """A generator of policy versions. Every method may be called from any thread."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    @property
    def max_rank(self) -> int | None:
        """Largest rank of an adapter that can be published. None: any, or not known before it is tried."""
        ...

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """Queue a request. A cancelled future is skipped if it has not started.

        Raises (from the future): RetiredVersion, EngineError; EngineDied once the engine has failed for good.
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

    def outage_s(self) -> float:
        """Seconds so far in which the engine was down and being restarted; they count against no rollout's timeout."""
        ...

    def close(self) -> None:
        """Stop. Queued requests fail with EngineError."""
        ...


class CallObserver(Protocol):
    """Told of the calls that a policy answers outside of rollouts, set as `policy.observer`."""

    temperature: float
    """What those calls sample at, meanwhile, that ask for none."""

    def add(self, request: GenerationRequest, generation: Generation, text: str) -> None:
        """A call was answered; the program saw `text`."""
        ...


class ServedPolicy(Protocol):
    """What the recorder needs of a policy."""

    name: str
    engine: Engine
    version: int
    """The current one, that training goes on from."""
    max_tokens: int
    """Of a call that does not say."""
    temperature: float
    """Of a call outside of rollouts that does not say, where there is no observer."""
    observer: CallObserver | None
    closed: bool
    """Whether it has been closed, and generates no more."""

    @property
    def lm_version(self) -> int:
        """The one that its `lm` stays at."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Prompt token ids of a conversation, ready for the assistant's turn."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens, without special tokens."""
        ...

    def fresh_seed(self) -> int:
        """The sampling seed of the next call outside of any rollout."""
        ...


def not_served(version: int, served: Iterable[int]) -> RetiredVersion:
    """The error of a request for a version that was retired, or was never there."""
    numbers = ", ".join(map(str, sorted(served)))
    return RetiredVersion(f"policy version {version} is not served any more; these are: {numbers}")


def check_process(made_in: int) -> None:
    """Raises EngineError in a process that was forked from the one that made an engine: its threads stayed there."""
    if os.getpid() != made_in:
        raise EngineError(
            f"the policy was made in process {made_in}, and this is {os.getpid()}, forked from it: its engine runs "
            "there alone; make a Policy in this process, or use threads"
        )


def end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a turn: those of the base model's generation config, and the tokenizer's.

    Raises:
        EngineError: neither names one.
    """
    own = generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in own:
        own.append(tokenizer.eos_token_id)
    if not own:
        raise EngineError("neither the model nor its tokenizer names an end-of-turn token")
    return own
