"""What a vLLM engine holds of the world: a server, a thread with an event loop, connections, adapters, a folder.

It knows nothing of the engine, so that it can be let go after an engine was dropped without `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fst_optimizer.engines.vllm.client import VLLMClient
from fst_optimizer.engines.vllm.server import VLLMServer
from fst_optimizer.errors import EngineError
from fst_optimizer.store.folders import TemporaryFolder

ResultT = TypeVar("ResultT")


@dataclass
class Holdings:
    """The loop runs in a thread of its own from the start."""

    server: VLLMServer | None
    client: VLLMClient
    folder: TemporaryFolder
    """Of the adapters' files."""
    adapters: dict[int, Path] = field(default_factory=dict)
    """Version -> its adapter's folder, whose name is the adapter's on the server."""

    def __post_init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()
        self._held = True
        self._thread = threading.Thread(target=self.loop.run_forever, name="fst-vllm", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine in the loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def let_go(self) -> None:
        """Stop an own server, unload the adapters from another's, end the loop, delete the files; once."""
        if not self._held or os.getpid() != self.pid:  # a forked process has none of it
            return
        self._held = False
        adapters, self.adapters = self.adapters, {}
        if self.server:
            self.server.stop()
            adapters = {}
        self.wait(self._leave(tuple(adapters.values())))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.folder.close()

    def let_go_later(self) -> None:
        """In a thread of its own: who finds that the engine is gone may be the loop itself, or hold any lock."""
        if self._held and os.getpid() == self.pid:
            threading.Thread(target=self.let_go, name="fst-vllm-end").start()

    async def _leave(self, adapters: Sequence[Path]) -> None:
        for adapter in adapters:
            with contextlib.suppress(EngineError, TimeoutError):
                await self.client.unload_adapter(adapter.name)
        await self.client.close()
        unfinished = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
