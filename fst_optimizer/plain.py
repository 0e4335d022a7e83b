"""Safe text and plain data: nothing that a model wrote reaches the terminal as a command, or a file as an object."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that reorder what follows them."""


def plain(text: str) -> str:
    r"""Text with its control characters spelled out: an escape code becomes `\x1b`, harmless and visible."""
    return "".join(char if _harmless(char) else _spelled(char) for char in text)


def _harmless(char: str) -> bool:
    return char in "\n\t" or not (unicodedata.category(char) in ("Cc", "Cs") or ord(char) in _BIDI)


def _spelled(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def plain_data(value: Any) -> Any:
    """Containers stay containers; anything else becomes text. Done twice, it changes nothing."""
    if isinstance(value, Mapping):
        return {str(name): plain_data(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(inner) for inner in value]
    return str(value)
