"""What was paid for since the last checkpoint, written down as it comes in.

A run that died does its unfinished phase once more. Everything in a phase follows from the state that it starts with,
the seed, and the answers of models and metrics; those answers are here, so that the second time costs nothing and
comes to the same. One file belongs to each checkpoint: the phase after it writes there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from fst_optimizer.store.files import sync, writing
from fst_optimizer.types import Rollout

logger = logging.getLogger(__name__)

SYNC_S = 1.0
"""A killed process loses no line; a power cut those of so many seconds."""

RolloutKey = tuple[int, str, str, int, float, bool]
"""Policy version, candidate id, example id, place in the group, temperature, whether feedback was asked for."""


class Journal:
    """One phase's answers. Threads add; the phase's own thread takes.

    Args:
        path: The file. What it holds already can be taken, each entry once; None: nothing is kept.
        clock: Seconds since the run started, noted with every entry.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.last_s = 0.0
        """When the last entry that was found was written."""
        self._clock = clock
        self._lock = threading.Lock()
        self._found: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._handle: IO[bytes] | None = None
        self._synced = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def rollout(self, key: RolloutKey) -> Rollout | None:
        """A rollout that was paid for already."""
        entry = self._take(f"rollout {json.dumps(key)}")
        return None if entry is None else Rollout.from_json(entry["rollout"])

    def add_rollout(self, key: RolloutKey, rollout: Rollout) -> None:
        """Write down one that was just paid for."""
        self._add(f"rollout {json.dumps(key)}", rollout=rollout.to_json())

    def reflection(self, prompt: Any) -> Mapping[str, Any] | None:
        """`text` and `cost_usd` of an answer that was paid for already."""
        return self._take(f"reflection {_digest(prompt)}")

    def add_reflection(self, prompt: Any, text: str, cost_usd: float | None) -> None:
        """Write down one that was just paid for; `cost_usd` is None where it is unknown."""
        self._add(f"reflection {_digest(prompt)}", text=text, cost_usd=cost_usd)

    def sync(self) -> None:
        """Make all of it survive a power cut."""
        with self._lock:
            if self._handle is not None and self.path is not None:
                with writing(self.path):
                    os.fsync(self._handle.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """The phase is over, or the run: all of it is safe on disk."""
        try:
            self.sync()
        finally:
            with self._lock:
                handle, self._handle = self._handle, None
                if handle is not None:
                    handle.close()

    @staticmethod
    def _append(handle: IO[bytes], line: bytes) -> None:
        """The whole line or nothing of it: a disk that fills may take a part, and say nothing."""
        before = os.fstat(handle.fileno()).st_size
        try:
            while line:
                line = line[handle.write(line) :]
        except OSError:
            handle.truncate(before)
            raise

    def _take(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            entries = self._found.get(key)
            return entries.popleft() if entries else None

    def _add(self, key: str, **fields: Any) -> None:
        if self.path is None:
            return
        # ASCII, and Python's NaN: whatever a rollout holds, numbers of a broken model included, must not be lost here.
        entry = json.dumps({"key": key, "time_s": self._clock(), **fields})
        line = f"{zlib.crc32(entry.encode()):08x} {entry}\n".encode()
        with self._lock, writing(self.path):
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = self.path.open("ab", buffering=0)
                sync(self.path.parent)
            self._append(self._handle, line)
            if time.monotonic() - self._synced >= SYNC_S:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()

    def _read(self, path: Path) -> None:
        """Take in every whole line; cut off a last one that was not finished."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        broken = 0
        for line in data[:whole].split(b"\n")[:-1]:
            entry = _entry(line)
            if entry is None:
                broken += 1
                continue
            self._found[entry["key"]].append(entry)
            self.last_s = max(self.last_s, entry["time_s"])
        if broken:
            logger.warning("%s: %d lines are damaged; what they held is paid for again", path, broken)
        if whole < len(data):
            with path.open("r+b") as handle:
                handle.truncate(whole)


def _entry(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, default=repr).encode()).hexdigest()
