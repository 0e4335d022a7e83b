"""Reflection LMs that a task can bring: a small model that was trained for it, and one that reads nothing.

Both are `dspy.LM`s on an engine of this process, cost nothing, and are loaded when they are first asked. What they
answer follows from what they are asked and its seed. A call without a seed gets one from the prompt and how often that
was asked before, so that a run in a process of its own can be repeated.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dspy
    from dspy.lm15 import Request, Response

    from fst_optimizer.policy.policy import Policy

_LOADING = threading.Lock()
MAX_TOKENS = 64
"""Of what a trained reflector writes."""


class TaskEngine:
    """What both have in common: the seed of a call that has none. dspy's custom engine contract."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> TaskEngine:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one prompt."""
        seed = request.config.seed
        if seed is None:
            text = "\n".join(message.text or "" for message in request.messages)
            with self._lock:
                seed = _hash(text, self._asked[text])
                self._asked[text] += 1
        return self.answer(request, seed)

    def answer(self, request: Request, seed: int) -> Response:
        """What it answers under a seed."""
        raise NotImplementedError


class _Trained(TaskEngine):
    """The model in a folder, at temperature 1."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def answer(self, request: Request, seed: int) -> Response:
        response: Response = _policy(self.folder).base_lm.engine.complete(
            replace(request, config=replace(request.config, seed=seed))
        )
        return response


class _Random(TaskEngine):
    """Texts drawn by seed."""

    def __init__(self, draw: Callable[[random.Random], str], name: str) -> None:
        super().__init__()
        self.draw, self.name = draw, name

    def answer(self, request: Request, seed: int) -> Response:
        from dspy.lm15 import Message, Response, TextPart, Usage

        prompt = "\n".join(message.text or "" for message in request.messages)
        text = self.draw(random.Random(_hash(prompt, seed)))
        return Response(
            id=None,
            model=self.name,
            message=Message.assistant([TextPart(f"```\n{text}\n```")]),
            finish_reason="stop",
            usage=Usage(input_tokens=len(prompt.split()), output_tokens=len(text.split())),
        )


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _policy(folder: str) -> Policy:
    with _LOADING:  # several may ask for it at once, and it is loaded once
        return _loaded(folder)


@cache
def _loaded(folder: str) -> Policy:
    from fst_optimizer.policy.policy import Policy

    return Policy(folder, temperature=1.0, max_tokens=MAX_TOKENS)


def trained_reflector(folder: str | Path) -> dspy.LM:
    """An LM on the model in `folder`, frozen and at temperature 1, named after the folder and the one above it.

    Nothing is loaded before it is first asked; then all LMs on the same folder share the model.
    """
    folder = Path(folder)
    return _lm(f"{folder.parent.name}-{folder.name}", _Trained(str(folder)))


def random_sentences(task: str, draw: Callable[[random.Random], str]) -> dspy.LM:
    """An LM that answers every prompt with a text that `draw` makes, in the backticks that GEPA asks for.

    It reads neither examples nor feedback: with it a prompt search knows nothing but scores.
    """
    return _lm(f"{task}-random-sentences", _Random(draw, f"{task}-random-sentences"))


def _lm(name: str, engine: TaskEngine) -> dspy.LM:
    import dspy

    return dspy.LM(f"hosted_vllm/{name}", engine=engine, cache=False, num_retries=0)
