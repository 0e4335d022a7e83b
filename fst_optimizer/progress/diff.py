"""What changed in a text, word by word, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

CONTEXT = 8
"""Words shown beside each change."""
LONGEST = 80
"""Words shown of one change."""
MOST_CHANGES = 12
COMPARED = 1000
"""Words on each side beyond which only what both begin and end with is looked for: the time grows with the square."""


def diff(old: str, new: str) -> str:
    """`Say [-yes-] {+no+} at the end.`: taken out, put in; what stayed is cut to the words beside a change.

    Words are compared, not the space between them.
    """
    parts = list(_opcodes(old.split(), new.split()))
    shown, changes = [], 0
    for place, (kind, before, after) in enumerate(parts):
        if kind == "equal":
            shown.append(_context(after, first=place == 0, last=place == len(parts) - 1))
            continue
        changes += 1
        if changes > MOST_CHANGES:
            shown.append("...")
            break
        shown += [f"[-{_cut(before)}-]"] * bool(before) + [f"{{+{_cut(after)}+}}"] * bool(after)
    return " ".join(shown)


def _opcodes(old: list[str], new: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(kind, old words, new words) in order."""
    start = _common(old, new)
    end = _common(old[start:][::-1], new[start:][::-1])
    a, b = old[start : len(old) - end], new[start : len(new) - end]
    if start:
        yield "equal", old[:start], new[:start]
    if max(len(a), len(b)) > COMPARED:
        yield "replace", a, b
    else:
        for kind, a1, a2, b1, b2 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
            yield kind, a[a1:a2], b[b1:b2]
    if end:
        yield "equal", old[len(old) - end :], new[len(new) - end :]


def _common(one: list[str], other: list[str]) -> int:
    """How many words both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _context(words: list[str], *, first: bool, last: bool) -> str:
    most = CONTEXT if first or last else 2 * CONTEXT
    if len(words) <= most + 1:
        return " ".join(words)
    head = [] if first else words[:CONTEXT]
    tail = [] if last else words[-CONTEXT:]
    return " ".join([*head, "...", *tail])


def _cut(words: list[str]) -> str:
    if len(words) > LONGEST:
        middle = f"... ({len(words) - LONGEST} words) ..."
        words = [*words[: LONGEST // 2], middle, *words[-LONGEST // 2 :]]
    return " ".join(word if len(word) <= 100 else f"{word[:100]}..." for word in words)
