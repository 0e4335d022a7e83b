"""Whether what an engine says that it sampled can be so, before anything is trained on it.

A log-prob of NaN spreads into every weight, one above 0 or a token that does not exist breaks a step, and tokens that
nobody asked for are not what the policy samples. A server may send any of these, being broken, mistaken for another,
or hostile.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import EngineError

FINISHES = ("stop", "length")
ROUNDING = 1e-3
"""How far above 0 rounding may leave a log-prob, in nats; it is taken for 0."""
LOWEST = -1000.0
"""No sampler draws a token this unlikely: float32's smallest probability is e^-104. vLLM writes -9999 for -infinity."""


def checked(
    request: GenerationRequest,
    token_ids: object,
    logprobs: object,
    finish: object,
    *,
    vocabulary: int,
    end_ids: Collection[int],
) -> Generation:
    """What was sampled for a request.

    Args:
        request: What was asked.
        token_ids: What the answer has for them, of any type.
        logprobs: Likewise.
        finish: Likewise.
        vocabulary: Rows of the model's embedding.
        end_ids: The tokens that end a turn.

    Raises:
        EngineError: it cannot be; the text has the field and its value.
    """
    ids, nats = _list(token_ids, "token_ids"), _list(logprobs, "logprobs")
    if not ids or len(ids) != len(nats):
        raise EngineError(f"the engine answered {len(ids)} token ids with {len(nats)} log-probs; each needs one")
    if len(ids) > request.max_tokens:
        raise EngineError(f"the engine answered {len(ids)} token ids where max_tokens was {request.max_tokens}")
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise _wrong(f"token_ids[{place}]", token, f"the model has the tokens 0 to {vocabulary - 1}")
        if token in end_ids and place + 1 < len(ids):
            raise _wrong(f"token_ids[{place}]", token, "it ends the turn, and more tokens follow")
    for place, nat in enumerate(nats):
        if type(nat) not in (int, float) or not LOWEST < nat <= ROUNDING:
            raise _wrong(f"logprobs[{place}]", nat, "a sampled token's log-prob is a finite number of nats, at most 0")
    if finish not in FINISHES:
        raise _wrong("finish_reason", finish, "only stop and length are a completion's end")
    if finish == "length" and len(ids) < request.max_tokens:
        raise _wrong("finish_reason", finish, f"{len(ids)} of {request.max_tokens} tokens were sampled")
    if finish == "stop" and ids[-1] not in end_ids and not request.stop:
        raise _wrong("finish_reason", finish, f"the last token, {ids[-1]}, does not end a turn")
    return Generation(tuple(ids), tuple(min(0.0, float(nat)) for nat in nats), str(finish))


def _list(value: object, field: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(field, value, "a list is needed")
    return list(value)


def _wrong(field: str, value: object, reason: str) -> EngineError:
    return EngineError(f"the engine's answer cannot be: {field} is {reprlib.repr(value)}; {reason}")
