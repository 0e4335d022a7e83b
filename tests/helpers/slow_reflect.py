"""What finds the sentences of feedback, as first written: simple, and in quadratic time. A reference for tests."""

import re
from collections import Counter
from itertools import chain

PERFECT = 1.0


def lessons(dataset):
    """The general sentences of the failing examples' feedback, with how many of those examples each is in.

    A sentence must recur over two failing examples (one, if only one fails), name nothing of its instance, and
    not be said of a passing example too.
    """
    praise = set()
    failing = []
    for entry in dataset:
        # The metric's own words: a parser's error recurs too, and states no rule.
        said = sentences(str(entry.get("Metric Feedback", entry.get("Feedback", ""))))
        if entry["Score"] >= PERFECT:
            praise.update(map(_words, said))
        else:
            failing.append([sentence for sentence in said if is_general(sentence, entry)])
    written = {}
    for sentence in chain.from_iterable(failing):
        written.setdefault(_words(sentence), sentence)
    counts = Counter(chain.from_iterable(set(map(_words, general)) - praise for general in failing))
    enough = min(2, len(failing))
    return {written[words]: counts[words] for words in written if counts[words] >= enough}


def is_general(sentence, entry):
    """Whether a sentence states a rule: nothing quoted, no value or number of this example, and not mere praise."""
    if _quoted_spans(sentence) or re.search('["`\u201c\u201d]', sentence):
        return False
    words = _words(sentence)
    if len(words.split()) < 2 or _words(sentence.rpartition(": ")[2]) in _PRAISE:
        return False
    values = [*_texts(entry.get("Inputs")), *_texts(entry.get("Generated Outputs")), *_texts(entry.get("Instance"))]
    numbers = {number for value in values for number in _NUMBER.findall(value)}
    if numbers.intersection(_NUMBER.findall(sentence)):
        return False
    # One or two letters are also articles and pronouns; as values they are recognised by their quotes.
    return not any(len(value.strip()) > 2 and _words(value).strip() and _words(value) in words for value in values)


def sentences(text):
    """The sentences of a text, as written. Lines end sentences too; a period inside quotes or brackets does not."""
    found = []
    for line in (_BULLET.sub("", line).strip() for line in text.splitlines()):
        spans, start = _quoted_spans(line), 0
        for match in _END.finditer(line):
            at, end = match.span()
            quoted = any(left <= at < right and end != right for left, right in spans)
            before = line[:at].split()[-1:] or [""]
            goes_on = before[0].lower() in _ABBREVIATIONS or line[end:].lstrip()[:1].islower()
            if not quoted and not goes_on:
                found.append(line[start:end].strip())
                start = end
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_ABBREVIATIONS = {"e.g", "i.e", "vs", "cf", "mr", "mrs", "dr", "fig"}
_PRAISE = {" right ", " all right ", " correct ", " good ", " good job ", " ok ", " perfect ", " well done "}
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "[": "]", "{": "}"}


def _quoted_spans(text):
    """Where quotes and brackets open and close again on one line, as half-open ranges."""
    spans = []
    at = 0
    while at < len(text):
        close = _closing(text, at)
        if close is not None:
            spans.append((at, close + 1))
        at = at + 1 if close is None else close + 1
    return spans


def _closing(text, at):
    """Where what opens at `at` closes; None when nothing opens there. An apostrophe neither opens nor closes."""
    mark = _QUOTES.get(text[at])
    if mark is None or (text[at] == mark and text[at - 1 : at].isalnum()):
        return None
    close = text.find(mark, at + 1)
    while close != -1 and mark in "'\u2019" and text[close + 1 : close + 2].isalnum():
        close = text.find(mark, close + 1)
    return None if close == -1 else close


def _texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value, str):
        for inner in value:
            yield from _texts(inner)
    elif value is not None:
        yield str(value)


def _words(text):
    """Lower-case words between single spaces, one at each end: `in` then compares whole words."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])
