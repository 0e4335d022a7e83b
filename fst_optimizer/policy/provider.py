"""Where a policy's LMs get dspy's training provider from: it is handed in, since the jobs behind it need the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspy.clients.provider import Provider

_make: Callable[[], Provider] | None = None


def use_provider(make: Callable[[], Provider]) -> None:
    """Let every `PolicyLM` made from now on be trained by `make()`. The package does so when it is imported."""
    global _make
    _make = make


def make_provider() -> Provider:
    """The provider of a new `PolicyLM`."""
    assert _make is not None, "fst_optimizer/__init__.py calls use_provider"
    return _make()
