"""Safe text and plain data: nothing that a model wrote reaches the terminal as a command, or a file as an object.

And times as people read them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from fst_optimizer.keys import without_keys

_UNSEEN = ("Cc", "Cs", "Cf", "Zl", "Zp")
"""Categories of characters that command the terminal, reorder or hide text, or break lines."""
_JOINERS = "\u200c\u200d"
"""Those of them that stay: some scripts and most emoji are written with them, and they reorder nothing."""


def plain(text: str) -> str:
    r"""Text with its unseen characters spelled out: an escape code becomes `\x1b`, harmless and visible."""
    return "".join(char if char in "\n\t" or not _unseen(char) else _spelled(ord(char)) for char in text)


def _unseen(char: str) -> bool:
    return unicodedata.category(char) in _UNSEEN and char not in _JOINERS


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def markdown(text: str) -> str:
    """Text for one line of a Markdown page: no HTML, link, picture, code or end of a cell comes of it."""
    line = " ".join(plain(text).split())
    for char in "\\`|{":
        line = line.replace(char, f"\\{char}")
    return html.escape(line, quote=False).replace("](", "]\\(")


def code_span(text: str) -> str:
    """Text for one line of a Markdown page, as code that it cannot end."""
    line = " ".join(plain(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    gap = " " * ("`" in line)
    return f"{fence}{gap}{line}{gap}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Text for a block of a Markdown page, as code that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{plain(text)}\n{fence}"


def unicode_only(text: str) -> str:
    r"""Text that can be written: half a character, as in the name of an odd file, becomes `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: object, limit: int = 200) -> str:
    """What a value looks like in an error's text: its `repr`, without keys, not too long, whatever it raises."""
    try:
        text = without_keys(repr(value))  # before it is cut: half a key is one
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}..."


DEEPEST = 100
"""Containers inside each other that are kept; what is below becomes `...`."""


def plain_data(value: Any, _inside: tuple[int, ...] = ()) -> Any:
    """Containers stay containers; anything else becomes text, without keys. Done twice, it changes nothing.

    A container that holds itself is `...` there, and what raises when it becomes text is named by its type.
    """
    if isinstance(value, Mapping | list | tuple):
        if id(value) in _inside or len(_inside) > DEEPEST:
            return "..."
        inside = (*_inside, id(value))
        if isinstance(value, Mapping):
            return {as_text(name): plain_data(inner, inside) for name, inner in value.items()}
        return [plain_data(inner, inside) for inner in value]
    return without_keys(value if isinstance(value, str) else as_text(value))


def as_text(value: object) -> str:
    """A value's `str` that can be written, or what it is where that raises."""
    try:
        return unicode_only(str(value))
    except Exception:
        return shown(value)


def clock(seconds: float) -> str:
    """`1:05` or `2:03:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
