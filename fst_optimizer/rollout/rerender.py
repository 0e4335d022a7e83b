"""What a predictor's call would have been under other instructions, with the same inputs: token for token.

A call's inputs are known where dspy's prompt format (`dspy.Adapter.format`) makes messages of them, just before the LM
is asked. There the same format is asked once more, with the other instruction in the signature and nothing else
changed. That is believed only where the same way gives back exactly the messages that the LM was asked: what something
else rewrote, in between or inside of the format, cannot be told.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from fst_optimizer.engines.recorder import Messages
from fst_optimizer.types import Texts

MOST_FORMATTED = 8
"""Formats since the last call of an LM that are looked at: a prompt format may use another one's."""


@dataclass(frozen=True)
class Formatted:
    """What a prompt format was given."""

    adapter: dspy.Adapter
    signature: type[dspy.Signature]
    demos: list[dict[str, Any]]
    inputs: Mapping[str, Any]

    def messages(self, instruction: str | None = None) -> Messages | None:
        """The messages, under another instruction where one is given; None where they hold more than text."""
        signature = self.signature if instruction is None else self.signature.with_instructions(instruction)
        with dspy.context(callbacks=[]):  # else this call would be noted as well
            made = self.adapter.format(signature, list(self.demos), dict(self.inputs))
        texts = [_text(message.get("content")) for message in made]
        if any(set(message) != {"role", "content"} for message in made) or None in texts:
            return None
        return [{"role": message["role"], "content": str(text)} for message, text in zip(made, texts, strict=True)]


_formatted: ContextVar[tuple[Formatted, ...]] = ContextVar("fst_formatted", default=())


class UnderTeacher(BaseCallback):  # type: ignore[misc]
    """Renders the calls of rollouts that run with this among dspy's callbacks, under a teacher's instructions.

    Args:
        own: The instructions of the program that runs, by component.
        teacher: The teacher's.
    """

    def __init__(self, own: Texts, teacher: Texts) -> None:
        self.own, self.teacher = own, teacher
        self.problems: dict[str, str] = {}
        """Component -> why a call of it could not be rendered."""
        self._lock = threading.Lock()

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A prompt format begins: a callback of dspy's."""
        one = Formatted(instance, inputs["signature"], inputs["demos"], inputs["inputs"])
        _formatted.set((*_formatted.get(), one)[-MOST_FORMATTED:])

    def __call__(self, component: str, messages: Messages) -> Messages | None:
        """The messages of this call under the teacher's instruction; None, with the problem noted, where unknown."""
        formatted = _formatted.get()
        _formatted.set(())
        own, teacher = self.own.get(component), self.teacher.get(component)
        if own == teacher:
            return messages  # also of a predictor that is no component: its instruction does not evolve
        found = next((one for one in reversed(formatted) if one.messages() == messages), None)
        if found is None:
            self._note(component, "its messages are not what dspy's prompt format made of its inputs")
        elif found.signature.instructions != own:
            self._note(component, "the program changes its instruction while it runs")
        elif (rendered := found.messages(teacher)) is None:
            self._note(component, "its messages are not what dspy's prompt format made of its inputs")
        else:
            return rendered
        return None

    def _note(self, component: str, problem: str) -> None:
        with self._lock:
            self.problems.setdefault(component, problem)


def _text(content: Any) -> str | None:
    """The text of a message; None where it holds anything else, such as an image or a tool's call."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return None if None in parts else "".join(map(str, parts))
