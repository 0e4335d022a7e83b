"""The reflector without an LM: the recurring sentences of the feedback."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fst_optimizer.evolve.reflect import PERFECT, Reflector


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
