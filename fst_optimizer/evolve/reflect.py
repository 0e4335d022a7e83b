"""Reflectors, which write new instructions, and the one that asks a reflection LM."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import dspy
from dspy.utils.usage_tracker import UsageTracker

from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflection_lm import is_policy, sampling_options
from fst_optimizer.failpoints import failpoint
from fst_optimizer.keys import without_secrets
from fst_optimizer.rollout.pool import run_jobs
from fst_optimizer.rollout.usage import usage_of
from fst_optimizer.store.journal import Journal
from fst_optimizer.store.meter import model_cost_usd

if TYPE_CHECKING:
    from fst_optimizer.store.meter import Prices

logger = logging.getLogger(__name__)

PERFECT = 1.0
"""The score from which on there is nothing to learn from an example."""

_SHOWN = ("Inputs", "Generated Outputs", "Feedback")
"""What GEPA's prompt shows of an entry."""


@dataclass(frozen=True)
class Ask:
    """One reflection to make; what the fields are says `Reflector.__call__`."""

    component: str
    current: str
    dataset: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What came of one reflection."""

    text: str | None
    note: str = ""
    """Why there is no text."""
    lost: bool = False
    """Whether there is none because the reflector failed, for a reason that may pass."""
    error: Exception | None = None
    """What the reflector raised."""


class Reflector(Protocol):
    """Proposes a new text for one component from examples of what it did."""

    before: int = 0
    """Reflections of the run in earlier processes."""
    calls: int = 0
    """How often it has reflected in this one. With a reflection LM each is one LM call."""
    cost_usd: float | None = 0.0
    """Dollars spent so far. None: some price is unknown."""
    model: str = ""
    """The reflection LM's, as prices have it."""
    note: str = ""
    """Why the last reflection proposed nothing; empty when it did propose."""
    failure: str = ""
    """Why every reflection so far failed, where the reason will not pass by itself; empty once one was answered."""

    def __call__(self, component: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        """A new text for a predictor whose instruction is `current`, or None when there is nothing to propose.

        `dataset` has entries as `gepa_adapter.Entry` describes them, one per example.
        """
        ...

    def many(self, asks: Sequence[Ask], at_once: int = 1) -> list[Answer]:
        """Reflect on all of these; answers in their order. One that fails loses none of the others.

        `at_once`: most calls of an LM in flight. A reflector without an LM has no use for it.

        Raises:
            StorageError: An answer could not be written down.
        """
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Answer:
        try:
            text = self(ask.component, ask.current, ask.dataset)
        except StorageError:
            raise
        except Exception as error:
            return Answer(None, lost=True, error=error)
        return Answer(text, self.note)


def reflection_prompt(current: str, dataset: Sequence[Mapping[str, Any]], max_tokens: int | None = None) -> Any:
    """GEPA's own prompt for a new instruction: a text, or messages where the dataset holds images.

    A text ends with the limit where there is one: an LM that does not know it writes what is rejected.
    """
    from gepa.strategies.instruction_proposal import InstructionProposalSignature

    shown = [{key: entry[key] for key in _SHOWN if key in entry} for entry in dataset]
    prompt = InstructionProposalSignature.prompt_renderer(
        {"current_instruction_doc": current, "dataset_with_feedback": shown}
    )
    if max_tokens is None or not isinstance(prompt, str):
        return prompt
    return f"{prompt}\n\nThe new instruction must not be longer than {max_tokens} tokens."


def written_instruction(answer: str) -> str:
    """The instruction in an answer to that prompt: what stands between its backticks, or all of it."""
    from gepa.strategies.instruction_proposal import InstructionProposalSignature

    return str(InstructionProposalSignature.output_extractor(answer)["new_instruction"]).strip()


class LMReflector(Reflector):
    """GEPA's own reflective proposer prompt, answered by any `dspy.LM`.

    The LM is called directly, not through a predictor, so that a policy that reflects on itself is not recorded
    as a program's call. A call that raises, or answers nothing new, gives None and a note.
    """

    def __init__(
        self,
        lm: dspy.LM,
        prices: Prices | None = None,
        seed: int = 0,
        *,
        max_tokens: int | None = None,
        grace_s: float = 0.0,
    ) -> None:
        """Uses the LM's own temperature and token limit. `prices` go over litellm's; `seed` is the run's.

        `max_tokens` of an instruction are asked for in the prompt (None: not a word of it).
        """
        self.lm = lm
        self.seed = seed
        self.max_tokens = max_tokens
        self.grace_s = grace_s
        self.model = str(getattr(lm, "model", ""))
        self.prices = prices or {}
        self.journal = Journal()
        """Where answers are written down, and found again by a run that is resumed."""
        self._answered = self._warned = False

    def __call__(self, component: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        """The instruction between the answer's backticks, or None."""
        (answer,) = self.many([Ask(component, current, dataset)])
        return answer.text

    def many(self, asks: Sequence[Ask], at_once: int = 1) -> list[Answer]:
        """The instructions between the answers' backticks, asked for side by side.

        What is said does not depend on who answers first: each call has its number in the run, and with it its seed
        and its place in the journal. An interrupt leaves those in flight `grace_s` to be written down.
        """
        first = self.before + self.calls + 1
        calls = [
            _Call(self, reflection_prompt(ask.current, ask.dataset, self.max_tokens), number)
            for number, ask in enumerate(asks, first)
        ]
        self.calls += len(calls)
        heard = (
            [call.run() for call in calls] if at_once == 1 or len(calls) == 1 else self._side_by_side(calls, at_once)
        )
        return [self._read(ask, one) for ask, one in zip(asks, heard, strict=True)]

    def _side_by_side(self, calls: Sequence[_Call], at_once: int) -> list[_Heard]:
        heard: dict[int, _Heard] = {}
        ended = run_jobs(
            calls,
            num_threads=at_once,
            timeout_s=math.inf,  # the LM has its own
            grace_s=self.grace_s if self.journal.path else 0.0,  # else what is answered is written down nowhere
            what="reflections",
        )
        with closing(ended):
            heard.update(ended)
        return [heard[place] for place in range(len(calls))]

    def _read(self, ask: Ask, heard: _Heard) -> Answer:
        """The new instruction in what was heard; counts its dollars, and what a failure says of later calls."""
        error = heard.error
        if isinstance(error, StorageError):
            raise error
        if error is not None:
            self.note = without_secrets(f"the reflection LM failed: {type(error).__name__}: {error}")
            logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s; the proposal is lost", self.note)
            self._warned = True
            if not self._answered and not will_pass(error):
                self.failure = self.note
            return Answer(None, self.note, lost=not self.failure)
        self._answered, self.failure = True, ""
        self.cost_usd = None if heard.cost_usd is None or self.cost_usd is None else self.cost_usd + heard.cost_usd
        text = written_instruction(heard.text)
        self.note = "" if text else "the reflection LM answered nothing"
        if text and text == ask.current.strip():
            self.note = "the reflection LM repeated the instruction"
        return Answer(None if self.note else text, self.note)

    def hear(self, prompt: Any, number: int) -> tuple[str, float | None]:
        """What the LM answers to reflection `number` of the run, from the journal where it is there; and its dollars.

        Safe to call from several threads.
        """
        found = self.journal.reflection(prompt, number)
        if found is not None:
            return str(found["text"]), found["cost_usd"]
        text, cost = self._answer(self.lm, prompt, **sampling_options(self.lm, self.seed, number))
        # A reasoning model without a reasoning parser thinks aloud, sometimes in backticks.
        text = str(failpoint("reflection.answer", text.rpartition("</think>")[2].strip()))
        self.journal.add_reflection(prompt, text, cost, number)
        return text, cost

    def try_out(self) -> None:
        """Ask a copy of the LM for one word, once and without cache. Its dollars are counted; it is no reflection.

        Raises:
            Exception: whatever the LM raises.
        """
        limit = "max_completion_tokens" if "max_completion_tokens" in self.lm.kwargs else "max_tokens"
        changed = {limit: 16}  # OpenAI's responses API refuses a lower one
        changed |= {name: value for name, value in (("cache", False), ("num_retries", 0)) if hasattr(self.lm, name)}
        try:
            cost = self._answer(self.lm.copy(**changed), "Answer with one word: ready")[1]
            self.cost_usd = None if cost is None or self.cost_usd is None else self.cost_usd + cost
        except Exception as error:
            if not _ABOUT_LENGTH.search(str(error)):  # a model that thinks first may find 16 tokens too few
                raise

    def _answer(self, lm: dspy.LM, prompt: Any, **options: Any) -> tuple[str, float | None]:
        """What the LM, or a copy of it, answers, and what that cost."""
        last, asked = next(reversed(lm.history), None), _Asked(dspy.settings.usage_tracker)
        with dspy.context(usage_tracker=asked):
            outputs = lm(prompt, **options)
        # Other calls may be in flight: this one's entry is the newest that has its prompt.
        new = takewhile(lambda entry: entry is not last, reversed(list(lm.history)))
        entry = next((entry for entry in new if entry.get("prompt") in (prompt, None)), None)
        cost = self._cost_usd(asked.entries, entry)
        first = outputs[0] if outputs else ""
        text = first.get("text") if isinstance(first, Mapping) else first
        return str(text or ""), cost

    def _cost_usd(self, asked: Sequence[Mapping[str, Any]], entry: Mapping[str, Any] | None) -> float | None:
        """What a call cost: by its tokens as for LMs in rollouts, else as dspy's history has it; None if unknown."""
        if is_policy(self.lm):
            return 0.0
        found = entry or {}
        # dspy tells of every call but those that its cache answers, and these have no usage in its history.
        hit = getattr(found.get("response"), "cache_hit", False)
        if not asked and (hit or found.get("usage") == {}):
            return 0.0
        told = asked or ([found["usage"]] if found.get("usage") else [])
        usage = usage_of(told)
        cost = model_cost_usd(self.model, usage, self.prices)
        return found.get("cost") if cost is None and not usage.untold else cost


@dataclass(frozen=True)
class _Heard:
    """What one call of the LM came to."""

    text: str = ""
    cost_usd: float | None = 0.0
    error: Exception | None = None


@dataclass(frozen=True)
class _Call:
    """One call of the LM, as a job for a thread. What it raises is its result: the others go on."""

    reflector: LMReflector
    prompt: Any
    number: int

    def run(self) -> _Heard:
        try:
            return _Heard(*self.reflector.hear(self.prompt, self.number))
        except Exception as error:
            return _Heard(error=error)

    def stop(self) -> None:
        """A call cannot be stopped: its answer is not waited for."""

    def timed_out(self, seconds: float) -> _Heard:
        raise AssertionError("a reflection has no deadline of its own")


class _Asked(UsageTracker):  # type: ignore[misc]
    """What dspy tells of the tokens of calls, each in turn; also told to `outer`, the program's own tracker."""

    def __init__(self, outer: UsageTracker | None) -> None:
        super().__init__()
        self.outer = outer
        self.entries: list[Mapping[str, Any]] = []

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        """One call was answered, and not from a cache."""
        self.entries.append(usage_entry)
        if self.outer is not None:
            self.outer.add_usage(lm, usage_entry)


_ABOUT_LENGTH = re.compile(r"max_?(output_|completion_)?tokens|output limit", re.IGNORECASE)
_WILL_PASS = re.compile(r"rate.?limit|time.?d?.?out|overloaded|unavailable|\b(408|429|50[0234])\b", re.IGNORECASE)


def will_pass(error: Exception) -> bool:
    """Whether a later call may be answered: rate limits, time-outs and overload pass, a wrong key does not."""
    return bool(_WILL_PASS.search(f"{type(error).__name__} {getattr(error, 'status_code', '')} {error}"))
