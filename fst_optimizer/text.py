"""Safe text and plain data: nothing that a model wrote reaches the terminal as a command, or a file as an object.

And times as people read them.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that reorder what follows them."""


def plain(text: str) -> str:
    r"""Text with its control characters spelled out: an escape code becomes `\x1b`, harmless and visible."""
    codes = {ord(char) for char in text if unicodedata.category(char) in ("Cc", "Cs")} | _BIDI
    spelled = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in codes}
    return text.translate(spelled | {ord("\n"): "\n", ord("\t"): "\t"})


def unicode_only(text: str) -> str:
    r"""Text that can be written: half a character, as in the name of an odd file, becomes `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: object, limit: int = 200) -> str:
    """What a value looks like in an error's text: its `repr`, not too long, whatever it raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}..."


DEEPEST = 100
"""Containers inside each other that are kept; what is below becomes `...`."""


def plain_data(value: Any, _inside: tuple[int, ...] = ()) -> Any:
    """Containers stay containers; anything else becomes text. Done twice, it changes nothing.

    A container that holds itself is `...` there, and what raises when it becomes text is named by its type.
    """
    if isinstance(value, Mapping | list | tuple):
        if id(value) in _inside or len(_inside) > DEEPEST:
            return "..."
        inside = (*_inside, id(value))
        if isinstance(value, Mapping):
            return {as_text(name): plain_data(inner, inside) for name, inner in value.items()}
        return [plain_data(inner, inside) for inner in value]
    return value if isinstance(value, str) else as_text(value)


def as_text(value: object) -> str:
    """A value's `str` that can be written, or what it is where that raises."""
    try:
        return unicode_only(str(value))
    except Exception:
        return shown(value)


_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_SECRETS = (
    re.compile(
        r"(?i)((?:api[_-]?key|access[_-]?token|token|secret|password|key)(?:=|%3D|[\"']?:\s*[\"']?))[^\s&\"',)]{6,}"
    ),
    re.compile(r"(?i)(bearer\s+)[\w.~+/-]{6,}=*"),
    re.compile(r"()\b(?:sk|rk|pk|hf|gsk|xai)[-_][\w-]{12,}"),
    re.compile(r"()\bAIza[\w-]{20,}"),
)


def without_secrets(text: str) -> str:
    """An error's text without keys: those in the environment, and what looks like one in an address or a header."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def clock(seconds: float) -> str:
    """`1:05` or `2:03:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
