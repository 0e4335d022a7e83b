"""Reflectors, which write new instructions: a reflection LM, or without one the recurring sentences of the feedback."""

from __future__ import annotations

import logging
import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import dspy
from dspy.utils.usage_tracker import UsageTracker

from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflection_lm import is_policy, sampling_options
from fst_optimizer.failpoints import failpoint
from fst_optimizer.keys import without_secrets
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
    lost: bool = False
    """Whether the last reflection proposed nothing because the LM failed."""
    failure: str = ""
    """Why every reflection so far failed, where the reason will not pass by itself; empty once one was answered."""

    def __call__(self, component: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        """A new text for a predictor whose instruction is `current`, or None when there is nothing to propose.

        `dataset` has entries as `gepa_adapter.Entry` describes them, one per example.
        """
        ...


def reflection_prompt(current: str, dataset: Sequence[Mapping[str, Any]]) -> Any:
    """GEPA's own prompt for a new instruction: a text, or messages where the dataset holds images."""
    from gepa.strategies.instruction_proposal import InstructionProposalSignature

    shown = [{key: entry[key] for key in _SHOWN if key in entry} for entry in dataset]
    return InstructionProposalSignature.prompt_renderer(
        {"current_instruction_doc": current, "dataset_with_feedback": shown}
    )


def written_instruction(answer: str) -> str:
    """The instruction in an answer to that prompt: what stands between its backticks, or all of it."""
    from gepa.strategies.instruction_proposal import InstructionProposalSignature

    return str(InstructionProposalSignature.output_extractor(answer)["new_instruction"]).strip()


class LMReflector(Reflector):
    """GEPA's own reflective proposer prompt, answered by any `dspy.LM`.

    The LM is called directly, not through a predictor, so that a policy that reflects on itself is not recorded
    as a program's call. A call that raises, or answers nothing new, gives None and a note.
    """

    def __init__(self, lm: dspy.LM, prices: Prices | None = None, seed: int = 0) -> None:
        """Uses the LM's own temperature and token limit. `prices` go over litellm's; `seed` is the run's."""
        self.lm = lm
        self.seed = seed
        self.model = str(getattr(lm, "model", ""))
        self.prices = prices or {}
        self.journal = Journal()
        """Where answers are written down, and found again by a run that is resumed."""
        self._answered = self._warned = False

    def __call__(self, component: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        """The instruction between the answer's backticks, or None."""
        prompt = reflection_prompt(current, dataset)
        try:
            answer = self._ask(prompt)
        except StorageError:
            raise
        except Exception as error:
            self.note = without_secrets(f"the reflection LM failed: {type(error).__name__}: {error}")
            logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s; the proposal is lost", self.note)
            self._warned = self.lost = True
            if not self._answered and not will_pass(error):
                self.failure = self.note
            return None
        self._answered, self.lost, self.failure = True, False, ""
        text = written_instruction(answer)
        self.note = "" if text else "the reflection LM answered nothing"
        if text and text == current.strip():
            self.note = "the reflection LM repeated the instruction"
        return None if self.note else text

    def _ask(self, prompt: Any) -> str:
        """The answer to the prompt, from the journal where it is there."""
        self.calls += 1
        found = self.journal.reflection(prompt)
        if found is not None:
            self._add_cost(found["cost_usd"])
            return str(found["text"])
        options = sampling_options(self.lm, self.seed, self.before + self.calls)
        text, cost = self._answer(self.lm, prompt, **options)
        self._add_cost(cost)
        # A reasoning model without a reasoning parser thinks aloud, sometimes in backticks.
        text = str(failpoint("reflection.answer", text.rpartition("</think>")[2].strip()))
        self.journal.add_reflection(prompt, text, cost)
        return text

    def try_out(self) -> None:
        """Ask a copy of the LM for one word, once and without cache. Its dollars are counted; it is no reflection.

        Raises:
            Exception: whatever the LM raises.
        """
        limit = "max_completion_tokens" if "max_completion_tokens" in self.lm.kwargs else "max_tokens"
        changed = {limit: 16}  # OpenAI's responses API refuses a lower one
        changed |= {name: value for name, value in (("cache", False), ("num_retries", 0)) if hasattr(self.lm, name)}
        try:
            self._add_cost(self._answer(self.lm.copy(**changed), "Answer with one word: ready")[1])
        except Exception as error:
            if not _ABOUT_LENGTH.search(str(error)):  # a model that thinks first may find 16 tokens too few
                raise

    def _answer(self, lm: dspy.LM, prompt: Any, **options: Any) -> tuple[str, float | None]:
        """What the LM, or a copy of it, answers, and what that cost."""
        last, asked = next(reversed(lm.history), None), _Asked(dspy.settings.usage_tracker)
        with dspy.context(usage_tracker=asked):
            outputs = lm(prompt, **options)
        entry = next(reversed(lm.history), None)
        cost = self._cost_usd(asked.entries, None if entry is last else entry)
        first = outputs[0] if outputs else ""
        text = first.get("text") if isinstance(first, Mapping) else first
        return str(text or ""), cost

    def _cost_usd(self, asked: Sequence[Mapping[str, Any]], entry: Mapping[str, Any] | None) -> float | None:
        """What a call cost: by its tokens as for LMs in rollouts, else as dspy's history has it; None if unknown."""
        if is_policy(self.lm):
            return 0.0
        found = entry or {}
        # dspy tells of every call but those that its cache answers, and these have no usage in its history.
        if getattr(found.get("response"), "cache_hit", False) or (not asked and found.get("usage") == {}):
            return 0.0
        told = asked or ([found["usage"]] if found.get("usage") else [])
        usage = usage_of(told)
        cost = model_cost_usd(self.model, usage, self.prices)
        return found.get("cost") if cost is None and not usage.untold else cost

    def _add_cost(self, cost_usd: float | None) -> None:
        self.cost_usd = None if cost_usd is None or self.cost_usd is None else self.cost_usd + cost_usd


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


class ExtractiveReflector(Reflector):
    """No LM: appends to the instruction the one feedback sentence that recurs most over failing examples.

    It keeps sentences as they are written. It can only find a rule that the feedback spells out, in the same
    words and without naming anything of the instance; it rephrases, combines and infers nothing.
    """

    def __init__(self, seed: int = 0) -> None:
        """`seed` decides among sentences that recur equally often."""
        self.seed = seed

    def __call__(self, component: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        """The current text with one more sentence, or None when no lesson is new."""
        self.calls += 1
        counts = lessons(dataset)
        order = list(counts)
        # Ties follow from the arguments alone, so that a resumed run proposes the same.
        random.Random(repr((self.seed, component, current, order))).shuffle(order)
        ranked = sorted(order, key=lambda sentence: -counts[sentence])
        known = _words(current)
        lesson = next((sentence for sentence in ranked if _words(sentence) not in known), None)
        self.note = "" if lesson else "no sentence of the feedback recurs that the instruction lacks"
        return f"{current.rstrip()} {lesson}".strip() if lesson else None


def lessons(dataset: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The general sentences of the failing examples' feedback, with how many of those examples each is in.

    A sentence must recur over two failing examples (one, if only one fails), name nothing of its instance, and
    not be said of a passing example too.
    """
    praise: set[str] = set()
    failing: list[list[str]] = []
    for entry in dataset:
        # The metric's own words: a parser's error recurs too, and states no rule.
        said = sentences(str(entry.get("Metric Feedback", entry.get("Feedback", ""))))
        if entry["Score"] >= PERFECT:
            praise.update(map(_words, said))
        else:
            instance = Instance.of(entry)
            failing.append([sentence for sentence in said if _states_rule(sentence, instance)])
    written: dict[str, str] = {}
    for sentence in chain.from_iterable(failing):
        written.setdefault(_words(sentence), sentence)
    counts = Counter(chain.from_iterable(set(map(_words, general)) - praise for general in failing))
    enough = min(2, len(failing))
    return {written[words]: counts[words] for words in written if counts[words] >= enough}


@dataclass(frozen=True)
class Instance:
    """What a sentence must not name to state a rule: the values of one example. Made once for all its sentences."""

    numbers: frozenset[str]
    values: Mapping[str, frozenset[str]]
    """The words of each value, by the first of them."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Instance:
        """Those of an entry of a reflector's dataset."""
        parts = ("Inputs", "Generated Outputs", "Instance")
        values = [value for part in parts for value in _texts(entry.get(part))]
        by_first: dict[str, set[str]] = defaultdict(set)
        for value in values:
            # One or two letters are also articles and pronouns; as values they are recognised by their quotes.
            if len(value.strip()) > 2 and (words := _words(value)).strip():
                by_first[words.split(maxsplit=1)[0]].add(words)
        numbers = frozenset(number for value in values for number in _NUMBER.findall(value))
        return cls(numbers, {first: frozenset(found) for first, found in by_first.items()})


def is_general(sentence: str, entry: Mapping[str, Any]) -> bool:
    """Whether a sentence states a rule: nothing quoted, no value or number of this example, and not mere praise."""
    return _states_rule(sentence, Instance.of(entry))


def _states_rule(sentence: str, instance: Instance) -> bool:
    if _quoted_spans(sentence) or re.search('["`\u201c\u201d]', sentence):
        return False
    words = _words(sentence)
    if len(words.split()) < 2 or _words(sentence.rpartition(": ")[2]) in _PRAISE:
        return False
    if instance.numbers.intersection(_NUMBER.findall(sentence)):
        return False
    near = chain.from_iterable(instance.values.get(word, ()) for word in set(words.split()))
    return not any(value in words for value in near)


def sentences(text: str) -> list[str]:
    """The sentences of a text, as written. Lines end sentences too; a period inside quotes or brackets does not.

    Takes time in proportion to the text, whatever it is: feedback may quote what a model wrote.
    """
    lines = (_BULLET.sub("", line).strip() for line in text.splitlines())
    return [sentence for line in lines for sentence in _of_line(line) if sentence]


def _of_line(line: str) -> Iterator[str]:
    spans, tokens = deque(_quoted_spans(line)), deque(match.span() for match in _TOKEN.finditer(line))
    start, before = 0, (0, 0)
    for match in _END.finditer(line):
        at, end = match.span()
        while spans and spans[0][1] <= at:
            spans.popleft()
        while tokens and tokens[0][0] < end:
            token = tokens.popleft()
            before = token if token[0] < at else before
        quoted = bool(spans) and spans[0][0] <= at and end != spans[0][1]
        last_word = line[before[0] : min(before[1], at)].lower()
        goes_on = last_word in _ABBREVIATIONS or bool(tokens and line[tokens[0][0]].islower())
        if not quoted and not goes_on:
            yield line[start:end].strip()
            start = end
    yield line[start:].strip()


_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
# Each run of marks is looked at once, from its beginning to its end.
_END = re.compile(r"(?<![.!?])[.!?]++[\"'\u201d\u2019)\]]*+(?=\s|$)")
_TOKEN = re.compile(r"\S+")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_ABBREVIATIONS = {"e.g", "i.e", "vs", "cf", "mr", "mrs", "dr", "fig"}
_PRAISE = {" right ", " all right ", " correct ", " good ", " good job ", " ok ", " perfect ", " well done "}
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "[": "]", "{": "}"}


def _quoted_spans(text: str) -> list[tuple[int, int]]:
    """Where quotes and brackets open and close again on one line, as half-open ranges.

    An apostrophe neither opens nor closes.
    """
    ends: dict[str, list[int]] = {mark: [] for mark in _QUOTES.values()}
    for at, char in enumerate(text):
        if char in ends and not (char in "'\u2019" and text[at + 1 : at + 2].isalnum()):
            ends[char].append(at)
    spans: list[tuple[int, int]] = []
    at = 0
    while at < len(text):
        mark = _QUOTES.get(text[at])
        if mark is not None and not (text[at] == mark and text[at - 1 : at].isalnum()):
            place = bisect_right(ends[mark], at)
            if place < len(ends[mark]):
                spans.append((at, ends[mark][place] + 1))
                at = ends[mark][place]
        at += 1
    return spans


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Iterable) and not isinstance(value, str):
        for inner in value:
            yield from _texts(inner)
    elif value is not None:
        yield str(value)


def _words(text: str) -> str:
    """Lower-case words between single spaces, one at each end: `in` then compares whole words."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])
