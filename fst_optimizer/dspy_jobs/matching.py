"""From text back to the tokens that were sampled.

dspy's GRPO trains on text: it hands over a prompt's messages and a completion written anew from the fields that were
parsed. `Generations` keeps what the policy sampled while a job runs, with its log-probs, and finds it again by the
prompt's token ids and the text.
"""

from __future__ import annotations

import hashlib
import re
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.types import Call

_HEADER = re.compile(r"^[ \t]*\[\[ ## (\w+) ## \]\]", re.MULTILINE)


@dataclass(frozen=True)
class Sampled:
    """One completion as it was sampled, without its prompt. In arrays: tuples would take five times the memory."""

    text: str
    """As the program saw it."""
    completion_ids: array[int]
    logprobs: array[float]
    temperature: float
    policy_version: int
    finish_reason: str

    def as_call(self, prompt_ids: tuple[int, ...]) -> Call:
        """The call that it was; which predictor made it is not known."""
        fields = {**vars(self), "completion_ids": tuple(self.completion_ids), "logprobs": tuple(self.logprobs)}
        return Call(predictor="", prompt_ids=prompt_ids, **fields)


class Generations:
    """The last `capacity` completions that a policy sampled outside of FST's rollouts: its `CallObserver`."""

    def __init__(self, capacity: int, temperature: float) -> None:
        self.capacity = capacity
        self.temperature = temperature
        self._by_prompt: dict[bytes, deque[Sampled]] = {}
        self._arrivals: deque[bytes] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, request: GenerationRequest, generation: Generation, text: str) -> None:
        """Remember a completion whose `text` the program saw."""
        key = _key(request.prompt_ids)
        sampled = Sampled(
            text=text.strip(),
            completion_ids=array("i", generation.completion_ids),
            logprobs=array("d", generation.logprobs),
            temperature=request.temperature,
            policy_version=request.version,
            finish_reason=generation.finish_reason,
        )
        with self._lock:
            self._by_prompt.setdefault(key, deque()).append(sampled)
            self._arrivals.append(key)
            if len(self._arrivals) > self.capacity:
                oldest = self._arrivals.popleft()
                self._by_prompt[oldest].popleft()
                if not self._by_prompt[oldest]:
                    del self._by_prompt[oldest]

    def find(self, prompt_ids: tuple[int, ...], text: str, occurrence: int = 0) -> Call | None:
        """The completion that this text was read from, or None.

        Of several, those of the newest version, with the very text before those that only read the same, the last
        first; `occurrence` counts through them, so that equal texts get the samples of their own.
        """
        with self._lock:
            known = list(self._by_prompt.get(_key(prompt_ids), ()))
        text = text.strip()
        alike = [one for one in reversed(known) if reads_as(one.text, text)]
        newest = max((one.policy_version for one in alike), default=0)
        found = sorted((one for one in alike if one.policy_version == newest), key=lambda one: one.text != text)
        return found[occurrence % len(found)].as_call(prompt_ids) if found else None


def reads_as(sampled: str, written: str) -> bool:
    """Whether dspy would read every field of `written` in `sampled` too.

    `written` is what dspy makes of the fields it parsed: without the words before the first field, and with its own
    blank lines. Text without fields must be the same but for white space.
    """
    wanted, there = _fields(written), _fields(sampled)
    if not wanted:
        return not there and sampled.split() == written.split()
    return all(there.get(name) == value for name, value in wanted.items())


def _fields(text: str) -> dict[str, str]:
    """Field -> value as `dspy.ChatAdapter` reads them, the closing marker left out."""
    parts = _HEADER.split(text)
    found: dict[str, str] = {}
    for name, value in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(name, value.strip())
    found.pop("completed", None)
    return found


def _key(prompt_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("i", prompt_ids).tobytes(), digest_size=16).digest()
