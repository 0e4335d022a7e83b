"""Rollouts and reflections since the last checkpoint, written down as they end.

A run that died does its unfinished phase again. Everything in a phase follows from the state that it starts with, the
seed, and the answers of models and metrics. Those answers are here, so that the phase is reproduced exactly and costs
nothing the second time. Each checkpoint has a journal file of its own, which the phase after it writes.
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
"""A killed process loses no line; a power cut loses at most those of this many seconds."""

RolloutKey = tuple[int | str | float | bool, ...]
"""Policy version, candidate id, example id, index in the group, temperature, whether feedback was captured; then which
draw it is, where the same rollout may be drawn again."""


class Journal:
    """The answers of one phase. Entries that the file holds already are handed out again, each once. Thread-safe.

    Args:
        path: The file. None: nothing is written down.
        clock: Seconds since the run started, noted with every entry.
        run_id: Part of every line's checksum, so that entries of another run count as damaged.
    """

    def __init__(
        self, path: Path | None = None, clock: Callable[[], float] = time.monotonic, run_id: str | None = None
    ) -> None:
        self.path = path
        self.last_s = 0.0
        """When the last entry that was found was written."""
        self._clock = clock
        self._start = zlib.crc32((run_id or "").encode())
        self._lock = threading.Lock()
        self._found: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._handle: IO[bytes] | None = None
        self._synced = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def rollout(self, key: RolloutKey) -> Rollout | None:
        """A rollout that ended before the run was resumed."""
        entry = self._take(f"rollout {json.dumps(key)}")
        return None if entry is None else Rollout.from_json(entry["rollout"])

    def add_rollout(self, key: RolloutKey, rollout: Rollout) -> None:
        """Write a rollout down."""
        self._add(f"rollout {json.dumps(key)}", rollout=rollout.to_json())

    def reflection(self, prompt: Any, number: int) -> Mapping[str, Any] | None:
        """`text` and `cost_usd` of reflection `number` of the run, if it was answered before the run was resumed.

        The same prompt may be in flight twice: the number tells the answers apart, whichever came first.
        """
        return self._take(f"reflection {_digest(prompt)}", number)

    def add_reflection(self, prompt: Any, text: str, cost_usd: float | None, number: int) -> None:
        """Write an answer down; `cost_usd` is None where it is unknown."""
        self._add(f"reflection {_digest(prompt)}", text=text, cost_usd=cost_usd, number=number)

    def sync(self) -> None:
        """Make all of it survive a power cut."""
        with self._lock:
            if self._handle is not None and self.path is not None:
                with writing(self.path):
                    sync(self.path)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Make all of it survive a power cut; nothing more is added."""
        try:
            self.sync()
        finally:
            with self._lock:
                if self._handle is not None:
                    self._handle.close()
                    self._handle = None

    def _take(self, key: str, number: int | None = None) -> dict[str, Any] | None:
        """The first entry with this key and number; one that an earlier version wrote has no number, and fits any."""
        with self._lock:
            entries = self._found.get(key, deque())
            found = next((entry for entry in entries if entry.get("number", number) == number), None)
            if found is not None:
                entries.remove(found)
            return found

    def _add(self, key: str, **fields: Any) -> None:
        if self.path is None:
            return
        # ASCII, and Python's NaN: a rollout must not be lost because a broken model gave it strange numbers or texts.
        entry = json.dumps({"key": key, "time_s": self._clock(), **fields})
        line = f"{zlib.crc32(entry.encode(), self._start):08x} {entry}\n".encode()
        with self._lock, writing(self.path):
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = self.path.open("ab", buffering=0)
                sync(self.path.parent)
            _append(self._handle, line)
            if time.monotonic() - self._synced >= SYNC_S:
                sync(self.path)
                self._synced = time.monotonic()

    def _read(self, path: Path) -> None:
        """Take in every whole line; cut off a last one that was not finished."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        broken = 0
        for line in data[:whole].split(b"\n")[:-1]:
            entry = _entry(line, self._start)
            if entry is None:
                broken += 1
                continue
            self._found[entry["key"]].append(entry)
            self.last_s = max(self.last_s, entry["time_s"])
        if broken:
            logger.warning("%s: %d lines are damaged, or of another run; what they held is run again", path, broken)
        if whole < len(data):
            with writing(path), path.open("r+b") as handle:
                handle.truncate(whole)


def _append(handle: IO[bytes], line: bytes) -> None:
    """Write the whole line or nothing: a full disk may take a part of it without an error."""
    before = os.fstat(handle.fileno()).st_size
    try:
        while line:
            line = line[handle.write(line) :]
    except OSError:
        handle.truncate(before)
        raise


def _entry(line: bytes, start: int) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text, start):
            return None
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, default=repr).encode()).hexdigest()
