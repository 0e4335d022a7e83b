"""Generation by a vLLM server: policy versions are LoRA adapters that the server knows by name.

Every publishing gets an adapter name that was never used before, `policy-000012-5f3a9c`. vLLM's prefix cache tells
adapters apart by name and folder alone: a name that came back with other weights would be served keys and values of the
old ones, and log-probs that match neither.

The base is served as an adapter too, one that adds nothing. vLLM's CPU kernels take "no adapter" for the last adapter
where both are in one batch (vllm-project/vllm#48421, open as of vLLM 0.32): the base's rows come out wrong, by nats.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.engines.base import Generation, GenerationRequest, check_process, not_served
from fst_optimizer.engines.vllm.client import ServerGone, VLLMClient
from fst_optimizer.engines.vllm.holdings import Holdings
from fst_optimizer.engines.vllm.restart import ServerConnection
from fst_optimizer.engines.vllm.server import VLLMServer
from fst_optimizer.errors import EngineError
from fst_optimizer.store.folders import TemporaryFolder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

WriteAdapter = Callable[[Mapping[str, "Tensor"], Path], None]
"""Writes LoRA tensors as a peft folder."""

DRAIN_S = 60.0
"""How long retiring a version waits for its requests before it cancels them."""
LINGER_S = 60.0
"""Files of an adapter outlive its unloading: a request that was just cancelled may still be on its way out of vLLM."""


class VLLMEngine:
    """Serves policy versions from a vLLM server, an own one or one that runs already.

    Args:
        server: A server to start, own and restart. None: `url` names one that somebody else runs, with its `api_key`.
        write_adapter: Writes LoRA tensors as a peft folder.
        base: LoRA tensors that add nothing: version 0.
        end_ids: The tokens that end a turn.
        vocabulary: Rows of the model's embedding.
        config: Limits and folders.

    Raises:
        UserError: there is no vLLM server at `url`.
        EngineError: the server at `url` refuses, or the own server did not start.
    """

    def __init__(
        self,
        *,
        server: VLLMServer | None = None,
        url: str = "",
        api_key: str = "",
        write_adapter: WriteAdapter,
        base: Mapping[str, Tensor],
        end_ids: Sequence[int],
        vocabulary: int,
        config: VLLMConfig,
    ) -> None:
        self.server = server
        self.max_rank = server.max_lora_rank if server else None
        self.end_ids = list(end_ids)
        self.max_live_versions = config.max_live_versions
        self._patience_s = config.start_timeout_s
        self._write_adapter = write_adapter
        self._retiring: set[int] = set()
        """Versions that take no new requests and still answer old ones."""
        self._unfinished: defaultdict[int, set[Future[Generation]]] = defaultdict(set)
        """Requests by version."""
        self._state = threading.Condition()
        """Guards what other threads share; notified when a request ends."""
        self._closed = False
        self._client = VLLMClient(
            end_ids,
            vocabulary=vocabulary,
            max_in_flight=config.max_in_flight,
            timeout_s=config.request_timeout_s,
        )
        # A server that is another's may read adapters after this process was killed: such a folder is left.
        folder = TemporaryFolder("fst-adapters-", config.adapter_dir, abandoned_if_killed=server is not None)
        self._held = Holdings(server, self._client, folder)
        weakref.finalize(self, self._held.let_go_later).atexit = False  # then, the server stops by itself
        self._connection = ServerConnection(
            self._client,
            server,
            url.rstrip("/").removesuffix("/v1"),
            api_key,
            patience_s=config.start_timeout_s,
            load_adapters=self._load_missing,
        )
        try:
            if server:
                server.start()
            self._held.wait(self._connection.open())
            self._load_version(0, base)
        except BaseException:
            self.close()
            raise

    @property
    def context_length(self) -> int:
        """See `Engine.context_length`: the server says."""
        return self._connection.context_length

    def allow_restarts(self) -> None:
        """From now on, a server that dies is restarted; before, its death is an error."""
        self._connection.restarts_allowed = True

    # -- the Engine protocol -----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See `Engine.submit`. Cancelling the future aborts the request in vLLM too."""
        version = request.version
        try:
            check_process(self._held.pid)  # before the lock: in a forked process, nobody may be there to give it back
            with self._state:
                self._check_open()
                if version not in self.versions():
                    raise not_served(version, self.versions())
                future = asyncio.run_coroutine_threadsafe(self._answer(request), self._held.loop)
                self._unfinished[version].add(future)
        except EngineError as error:
            refused: Future[Generation] = Future()
            refused.set_exception(error)
            return refused
        future.add_done_callback(lambda done: self._ended(version, done))
        return future

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.publish`. Returns when the server has loaded the adapter.

        Raises:
            EngineError: as many versions are served as `vllm.max_live_versions` allows, or loading failed.
        """
        self._check_open()
        live = sorted(self._held.adapters.keys() - {0})
        if len(live) >= self.max_live_versions:
            raise EngineError(
                f"policy version {version} cannot be published: {', '.join(map(str, live))} are served, as many as "
                f"vllm.max_live_versions ({self.max_live_versions}) allows; raise it, or drop compiled programs and "
                "LMs that policy.lm_at returned"
            )
        self._load_version(version, tensors)

    def retire(self, version: int) -> None:
        """See `Engine.retire`. Waits for the version's requests and unloads it; its files are deleted later."""
        check_process(self._held.pid)
        with self._state:
            if not version or version not in self.versions():
                return
            self._retiring.add(version)
            drained = self._state.wait_for(lambda: not self._unfinished[version], DRAIN_S)
            stuck = () if drained else tuple(self._unfinished[version])
        for future in stuck:
            future.cancel()
        if stuck:
            logger.warning("policy version %d is retired; %d requests for it were cancelled", version, len(stuck))
        with self._state:
            adapter = self._held.adapters.pop(version, None)
            self._retiring.discard(version)
            self._unfinished.pop(version, None)
        if adapter is None:  # closed meanwhile
            return
        if not self._connection.failure and not self._closed:
            # A server that died has unloaded it as well, and is not restarted for this.
            with contextlib.suppress(ServerGone):
                self._held.wait(self._client.unload_adapter(adapter.name))
        self._delete_later(adapter)

    def versions(self) -> frozenset[int]:
        """See `Engine.versions`."""
        with self._state:
            return frozenset(self._held.adapters.keys() - self._retiring)

    def outage_s(self) -> float:
        """See `Engine.outage_s`."""
        return self._connection.outage_s()

    def close(self) -> None:
        """See `Engine.close`. An own server is stopped; from another's, our adapters are unloaded."""
        if self._closed:
            return
        self._closed = self._connection.closing = True
        self._held.let_go()

    # -- adapters ----------------------------------------------------------------------------------------------

    def adapter(self, version: int) -> Path:
        """A version's folder, whose name is the server's name of it. Raises RetiredVersion where it is not served."""
        adapter = self._held.adapters.get(version)
        if adapter is None:
            raise not_served(version, self.versions())
        return adapter

    def try_adapter(self, tensors: Mapping[str, Tensor], request: GenerationRequest) -> Generation:
        """Sample from an adapter that is no policy version, and unload it again."""
        adapter = self._write("probe", tensors)

        async def sampled() -> Generation:
            await self._client.load_adapter(adapter)
            try:
                return await self._client.complete(adapter.name, request)
            finally:
                await self._client.unload_adapter(adapter.name)

        try:
            return self._held.wait(sampled())
        finally:
            self._delete_later(adapter)

    def _load_version(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        adapter = self._write(f"policy-{version:06d}", tensors)
        try:
            self._held.wait(self._connection.ask(lambda: self._client.load_adapter(adapter)))
        except BaseException:
            shutil.rmtree(adapter, ignore_errors=True)
            raise
        with self._state:
            self._held.adapters[version] = adapter

    def _write(self, prefix: str, tensors: Mapping[str, Tensor]) -> Path:
        adapter = self._held.folder.path / f"{prefix}-{secrets.token_hex(3)}"
        self._write_adapter(tensors, adapter)
        return adapter

    async def _load_missing(self) -> None:
        """Load every live version that the server does not know."""
        known = {model["id"] for model in await self._client.models()}
        with self._state:
            missing = [adapter for adapter in self._held.adapters.values() if adapter.name not in known]
        for adapter in missing:
            await self._client.load_adapter(adapter)

    def _delete_later(self, adapter: Path) -> None:
        if not self._closed:  # else they are gone with the folder
            loop = self._held.loop  # alone: the engine itself need not stay for this
            loop.call_soon_threadsafe(lambda: loop.call_later(LINGER_S, shutil.rmtree, adapter, True))

    # -- requests ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        check_process(self._held.pid)
        if self._closed:
            raise EngineError("the engine is closed")
        if self._connection.failure:
            raise self._connection.failure

    async def _answer(self, request: GenerationRequest) -> Generation:
        try:
            # Before restarts are allowed, someone waits for the check of a server that may never answer.
            async with asyncio.timeout(None if self._connection.restarts_allowed else self._patience_s):
                generation = await self._connection.ask(
                    lambda: self._client.complete(self.adapter(request.version).name, request)
                )
        except TimeoutError as error:
            raise EngineError(
                f"the server did not answer its first request within {self._patience_s:g} s (vllm.start_timeout_s)"
            ) from error
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed") from None
            raise
        self._connection.completed()
        return generation

    def _ended(self, version: int, future: Future[Generation]) -> None:
        with self._state:
            self._unfinished.get(version, set()).discard(future)
            self._state.notify_all()
