"""An engine whose completions a function writes, and completions that dspy parses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import EngineError, RetiredVersion

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.policy import Policy

Answer = Callable[[str, GenerationRequest], str]
"""From the prompt's text, special tokens included, and the request, the completion's text."""


def chat_answer(**fields: object) -> str:
    """A completion that dspy's ChatAdapter parses into these output fields."""
    parts = [f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


class ScriptedEngine:
    """An engine whose completions a function writes, for any policy version.

    Token ids are exactly those of the answer's text and an end token, cut to max_tokens; log-probs are made up, but
    always the same for a token, its place and a version. What `answer` raises fails that request.

    Args:
        policy: Whose tokenizer is used.
        answer: Writes the completions, in the thread that asks.
        context_length: Most tokens of prompt and completion together.
    """

    def __init__(self, policy: Policy, answer: Answer, *, context_length: int = 4096) -> None:
        self.policy = policy
        self.answer = answer
        self.context_length = context_length
        self.max_rank: int | None = None
        self.requests: list[GenerationRequest] = []
        """All that was asked, in order of arrival."""
        self.published: list[int] = []
        self.retired: list[int] = []
        self.closed = False
        self._served = {0}
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See `Engine.submit`; the future is done when this returns."""
        future: Future[Generation] = Future()
        try:
            future.set_result(self._generate(request))
        except Exception as error:
            future.set_exception(error)
        return future

    def prompt_text(self, request: GenerationRequest) -> str:
        """A request's prompt as text, special tokens included."""
        return str(self.policy.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False))

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.publish`."""
        self.published.append(version)
        self._served.add(version)

    def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        if version and version in self._served:
            self._served.discard(version)
            self.retired.append(version)

    def versions(self) -> frozenset[int]:
        """See `Engine.versions`."""
        return frozenset(self._served)

    def outage_s(self) -> float:
        """See `Engine.outage_s`."""
        return 0.0

    def close(self) -> None:
        """See `Engine.close`."""
        self.closed = True

    def _generate(self, request: GenerationRequest) -> Generation:
        with self._lock:
            self.requests.append(request)
        if self.closed:
            raise EngineError("the engine is closed")
        if request.version not in self._served:
            raise RetiredVersion(f"policy version {request.version} is not served any more")
        text = self.answer(self.prompt_text(request), request)
        tokenizer = self.policy.tokenizer
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        kept = tuple(ids[: request.max_tokens])
        logprobs = tuple(_made_up(token, place, request.version) for place, token in enumerate(kept))
        return Generation(kept, logprobs, "stop" if len(kept) == len(ids) else "length")


def _made_up(token: int, place: int, version: int) -> float:
    return -1.0 - (token * 7919 + place * 104_729 + version * 1_299_709) % 997 / 1000
