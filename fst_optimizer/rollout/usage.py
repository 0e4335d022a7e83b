"""What LMs that are not trained were asked: every call that dspy's LMs make for a rollout, with or without tokens.

dspy tells its usage tracker of every call that no cache answered. Its own tracker forgets calls without tokens, and a
program may put one in the place of a rollout's (`dspy.track_usage`); a thread that no rollout started has none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.utils.usage_tracker import UsageTracker

from fst_optimizer.engines.recorder import SETTING
from fst_optimizer.keys import keep_keys_of_lm
from fst_optimizer.types import Usage, total_usage

TRACKER = "fst_usage"
"""The dspy setting with a rollout's `CallTracker`."""
OnUsage = Callable[[Mapping[str, Usage]], None]


def usage_of(entries: Sequence[Mapping[str, Any]]) -> Usage:
    """What dspy told of one model's calls, an entry each, summed."""
    return sum(map(_usage_of_call, entries), Usage())


def _usage_of_call(entry: Mapping[str, Any]) -> Usage:
    prompt, completion = entry.get("prompt_tokens"), entry.get("completion_tokens")
    details = entry.get("prompt_tokens_details") or {}  # a mapping, or a class of litellm's
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else getattr(details, "cached_tokens", 0)
    # A prompt has tokens: litellm writes 0 where a server tells none.
    untold = not prompt or completion is None
    return Usage(1, prompt or 0, cached or 0, completion or 0, untold=int(untold))


class CallTracker(UsageTracker):  # type: ignore[misc]
    """Counts the calls of one rollout, from any of its threads; those after `close` are told to who closed it."""

    def __init__(self, late: OnUsage | None = None) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._spent: dict[str, Usage] = {}
        self._late = late

    def __deepcopy__(self, memo: dict[int, object]) -> CallTracker:
        return self  # dspy.Parallel gives each of its threads a copy and never looks at it again

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        """One call was answered, and not from a cache."""
        super().add_usage(lm, usage_entry)  # for programs that read it
        usage = {lm: _usage_of_call(usage_entry)}
        with self._lock:
            if self._late is None:
                self._spent = total_usage(self._spent, usage)
                return
        self._late(usage)

    def close(self, late: OnUsage) -> dict[str, Usage]:
        """What was asked since the last `close`."""
        with self._lock:
            spent, self._spent, self._late = self._spent, {}, late
        return spent


def told_by_others(plain: Callable[..., None]) -> Callable[..., None]:
    """`UsageTracker.add_usage`: what a tracker of the program's own is told, the rollout's is told too."""

    @functools.wraps(plain)
    def add_usage(tracker: UsageTracker, lm: str, usage_entry: dict[str, Any]) -> None:
        own = dspy.settings.get(TRACKER)
        if own is not None and tracker is not own and tracker is dspy.settings.usage_tracker:
            own.add_usage(lm, usage_entry)
        plain(tracker, lm, usage_entry)

    return add_usage


# -- calls from outside of rollouts -------------------------------------------------------------------------------

_listening: list[OnUsage] = []


@contextmanager
def counting_strays(on_usage: OnUsage) -> Iterator[None]:
    """Calls of LMs from outside of rollouts meanwhile, which nobody else counts, are told to `on_usage`."""
    _listening.append(on_usage)
    try:
        yield
    finally:
        _listening.remove(on_usage)


def _stray_tracker() -> CallTracker | None:
    if not _listening or SETTING in dspy.settings or dspy.settings.usage_tracker is not None:
        return None

    def tell(usage: Mapping[str, Usage], listening: Sequence[OnUsage] = tuple(_listening)) -> None:
        for one in listening:
            one(usage)

    return CallTracker(tell)


def counted_call(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseLM.__call__`."""

    @functools.wraps(plain)
    def call(lm: dspy.BaseLM, *args: Any, **kwargs: Any) -> Any:
        keep_keys_of_lm(lm, kwargs)
        tracker = _stray_tracker()
        if tracker is None:
            return plain(lm, *args, **kwargs)
        with dspy.context(usage_tracker=tracker):
            return plain(lm, *args, **kwargs)

    return call


def counted_acall(plain: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`BaseLM.acall`."""

    @functools.wraps(plain)
    async def acall(lm: dspy.BaseLM, *args: Any, **kwargs: Any) -> Any:
        keep_keys_of_lm(lm, kwargs)
        tracker = _stray_tracker()
        if tracker is None:
            return await plain(lm, *args, **kwargs)
        with dspy.context(usage_tracker=tracker):
            return await plain(lm, *args, **kwargs)

    return acall
