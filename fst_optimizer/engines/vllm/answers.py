"""What a server's answers mean. The server is not trusted: each answer is bounded in size, and checked whole."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.engines.checks import checked
from fst_optimizer.errors import EngineError
from fst_optimizer.text import plain

CONTROL_BYTES = 8 << 20
"""Limit of an answer that carries no completion."""
TOKEN_BYTES, PROMPT_TOKEN_BYTES, OTHER_BYTES = 2048, 16, 64 << 10
"""Limits of a completion's parts: vLLM writes a token's text three times, a prompt's token as a number."""
LONGEST_CONTEXT = 1 << 30


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    body: bytes
    retry_after_s: float | None = None
    """After how many seconds the server wants to be asked again, where it says so."""

    @property
    def message(self) -> str:
        """The words in an error's body."""
        try:
            error = json.loads(self.body)
            error = error.get("error", error)
            text = str(error.get("message", error) if isinstance(error, Mapping) else error)
        except (ValueError, AttributeError, RecursionError):
            text = self.body[:500].decode(errors="replace")
        return plain(text[:500])


def body_limit(request: GenerationRequest) -> int:
    """Most bytes that the answer to a request may have."""
    return OTHER_BYTES + TOKEN_BYTES * request.max_tokens + PROMPT_TOKEN_BYTES * len(request.prompt_ids)


def generation_of(
    body: bytes, model: str, request: GenerationRequest, *, vocabulary: int, end_ids: Collection[int]
) -> Generation:
    """What was sampled, in an answer of `/v1/completions` to this request for `model`.

    Raises:
        EngineError: it is no such answer, or one that cannot be; the text has the field and its value.
    """
    answer = _object(body, "token ids")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(f"the server's answer has no token ids: choices is {reprlib.repr(choices)}, not one object")
    (choice,) = choices
    logprobs = choice.get("logprobs")
    if choice.get("token_ids") is None or not isinstance(logprobs, dict):
        raise EngineError(f"the server's answer has no token ids and log-probs: {body[:200]!r}")
    if answer.get("model") != model:
        raise EngineError(f"the server answered for model {reprlib.repr(answer.get('model'))}, asked was {model!r}")
    prompt_ids = choice.get("prompt_token_ids")
    if prompt_ids is not None and prompt_ids != list(request.prompt_ids):
        raise EngineError("the server's answer has another prompt: prompt_token_ids is not what was sent")
    return checked(
        request,
        choice["token_ids"],
        logprobs.get("token_logprobs"),
        choice.get("finish_reason"),
        vocabulary=vocabulary,
        end_ids=end_ids,
    )


def models_of(body: bytes) -> list[dict[str, Any]]:
    """What an answer of `/v1/models` lists.

    Raises:
        EngineError: it lists nothing that has names.
    """
    listed = _object(body, "list of models").get("data")
    if not isinstance(listed, list) or not all(isinstance(one, dict) and type(one.get("id")) is str for one in listed):
        raise EngineError(f"the server's answer lists no models: data is {reprlib.repr(listed)}")
    return listed


def context_of(models: list[dict[str, Any]]) -> int | None:
    """The context length of the base among these models; None where there is no base, or it says none."""
    base = next((model for model in models if not model.get("parent")), {})
    length = base.get("max_model_len")
    return length if type(length) is int and 0 < length <= LONGEST_CONTEXT else None


def _object(body: bytes, wanted: str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise EngineError(f"the server's answer has no {wanted}, as it is no JSON object: {body[:200]!r}")
    return answer
