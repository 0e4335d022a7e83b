"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    level: Literal["ok", "warn", "fail"]
    """`fail`: a run would be refused for it."""
    name: str
    text: str

    def __str__(self) -> str:
        """On one line."""
        return f"{self.level} {self.name}: {' '.join(self.text.split())}"
