"""The frozen model that needs no key: it advises on the troubles in `advice.py`, and on nothing else.

It helps as far as it is told: a prompt that does not say what is in trouble, and what the matter is, gets a question
back.
"""

import json
from typing import TYPE_CHECKING, Any

import dspy

from .advice import TOPICS

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

NAME = "papillon/offline"
UNKNOWN = "What is in trouble, and what is the matter with it?"


def advise(prompt: str) -> str:
    """All points on each trouble that the prompt describes, or a question."""
    return " ".join(topic.advice for topic in TOPICS.values() if topic.known_in(prompt)) or UNKNOWN


class OfflineEngine:
    """dspy's custom engine contract: `complete(Request) -> Response`. The same prompt gets the same answer."""

    def __deepcopy__(self, memo: dict[int, object]) -> "OfflineEngine":
        return self  # dspy deep-copies a program's LMs

    def complete(self, request: "Request") -> "Response":
        """Answers the last message, in the format that it asks for."""
        from dspy.lm15 import Message, Response, TextPart, Usage

        asked = request.messages[-1].text or ""
        answer = advise(asked)
        if "[[ ## answer ## ]]" in asked:
            text = f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"
        else:
            text = json.dumps({"answer": answer})
        return Response(
            id="offline",
            model=NAME,
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=len(asked.split()), output_tokens=len(text.split())),
        )


class OfflineLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` on the engine. A saved program does not hold it: dspy does not load custom engines."""

    def __init__(self, **settings: Any) -> None:
        """Settings are those of `dspy.LM`; dspy passes them when it copies one."""
        super().__init__(**{"model": NAME, "engine": OfflineEngine(), "cache": False, "num_retries": 0, **settings})

    def dump_state(self) -> dict[str, Any]:
        """Empty, which dspy reads as "no LM of its own"."""
        return {}
