"""`metrics.jsonl` and the callbacks: the same numbers, once for programs and once for eyes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.errors import StopRun
from fst_optimizer.store.files import sync, writing
from fst_optimizer.types import RolloutCounts

Callback = Callable[[Mapping[str, Any]], None]
"""Receives every line of `metrics.jsonl`, and `{"kind": "progress", "phase", "done", "total", ...}` in between.

It may raise `StopRun`: the run then ends after the phase that is under way."""


class MetricsLog:
    """Appends lines with the fields that all of them share.

    Args:
        path: The run's `metrics.jsonl`.
        callbacks: Told of every line.
    """

    def __init__(self, path: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.path = path
        self.callbacks = tuple(callbacks)
        self.stop_asked = False
        """Whether a callback wants the run to end."""
        self._started = time.monotonic()

    @property
    def time_s(self) -> float:
        """Seconds since the run started, across resumes."""
        return round(time.monotonic() - self._started, 3)

    def line(
        self, kind: str, *, cycle: int, step: int, policy_version: int, rollouts: RolloutCounts, **fields: Any
    ) -> None:
        """Append one line and tell the callbacks. A number that is not finite, which JSON has no word for, is null."""
        data = {
            "kind": kind,
            "cycle": cycle,
            "step": step,
            "policy_version": policy_version,
            "time_s": self.time_s,
            "rollouts": rollouts.to_json(),
            **{name: _finite(value) for name, value in fields.items()},
        }
        with writing(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
        self._tell(data)

    def progress(self, phase: str, done: int, total: int, **fields: Any) -> None:
        """Tell the callbacks, and nobody else, how far a phase is."""
        self._tell({"kind": "progress", "phase": phase, "done": done, "total": total, **fields})

    def size(self) -> int:
        """Bytes written so far, safe on disk; a checkpoint keeps it, so that a resume can cut what came after."""
        if not self.path.exists():
            return 0
        with writing(self.path):
            sync(self.path)
        return self.path.stat().st_size

    def resume(self, size: int, elapsed_s: float) -> None:
        """Go on from a checkpoint: forget the lines after it, and count the seconds that the run has taken."""
        self._started = time.monotonic() - elapsed_s
        with writing(self.path), self.path.open("a") as handle:
            handle.truncate(min(size, self.path.stat().st_size))

    def _tell(self, data: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            try:
                callback(data)
            except StopRun:
                self.stop_asked = True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
