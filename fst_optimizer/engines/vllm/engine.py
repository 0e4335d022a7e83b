"""Generation by a vLLM server: policy versions as LoRA adapters by name, and what happens when the server dies.

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
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.engines.base import Generation, GenerationRequest, end_ids
from fst_optimizer.engines.vllm.agreement import check_agreement, restart
from fst_optimizer.engines.vllm.client import AdapterMissing, ServerGone, VLLMClient
from fst_optimizer.engines.vllm.server import OnWait, VLLMServer
from fst_optimizer.errors import EngineDied, EngineError, RetiredVersion, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.policy import Policy

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

WriteAdapter = Callable[[Mapping[str, "Tensor"], Path], None]
"""Writes LoRA tensors as a peft folder."""

DEATHS = 3
"""Deaths of the server in a row, without one completion in between, after which the engine gives up."""
DRAIN_S = 60.0
"""How long retiring a version waits for its requests before it cancels them."""
LINGER_S = 60.0
"""Files of an adapter outlive its unloading: a request that was just cancelled may still be on its way out of vLLM."""


def vllm_engine(policy: Policy, api_key: str | None = None, on_wait: OnWait | None = None) -> VLLMEngine:
    """The engine of a policy: attached to the server at `policy.url`, or with a server of its own.

    Raises:
        UserError: vLLM is not installed, or the server and the trainer do not agree.
        EngineError: the own server did not start.
    """
    from fst_optimizer.model import lora

    config = policy.vllm or VLLMConfig()
    server = None
    if policy.url is None:
        server = VLLMServer(
            policy.source,
            max_lora_rank=policy.rank,
            config=config,
            dtype=str(policy.model.dtype).removeprefix("torch."),
            quantization={None: None, "nf4": "bitsandbytes"}[policy.quantization],
            trust_remote_code=policy.trust_remote_code,
            on_wait=on_wait,
        )
    engine = None
    try:
        engine = VLLMEngine(
            server=server,
            url=policy.url or "",
            api_key=api_key or "",
            write_adapter=lambda tensors, folder: lora.save_adapter(policy.model, tensors, folder),
            base=policy.zero_adapter,
            end_ids=end_ids(policy.model.get_base_model().generation_config, policy.tokenizer),
            config=config,
        )
        check_agreement(policy, engine)
    except BaseException as error:
        if engine:
            engine.close()
        if server is None and isinstance(error, EngineError):
            raise UserError(f"the vLLM server at {policy.url} cannot be used: {error}; {restart(policy)}") from error
        raise
    engine.proven = True
    return engine


@dataclass(frozen=True)
class _Adapter:
    name: str
    folder: Path


class VLLMEngine:
    """Serves policy versions from a vLLM server, an own one or one that runs already.

    Args:
        server: A server to start, own and restart. None: `url` names one that somebody else runs.
        url: Where the server to attach to listens.
        api_key: Its key.
        write_adapter: Writes LoRA tensors as a peft folder.
        base: LoRA tensors that add nothing: version 0.
        end_ids: The tokens that end a turn.
        config: Limits and folders.

    Raises:
        UserError: the server at `url` cannot be used; the text says what to restart it with.
        EngineError: the own server did not start.
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
        config: VLLMConfig,
    ) -> None:
        self.server = server
        self.end_ids = list(end_ids)
        self.max_live_versions = config.max_live_versions
        self.url = url.rstrip("/").removesuffix("/v1")
        self.context_length = 0
        self._api_key = api_key
        self._write_adapter = write_adapter
        self._config = config
        self._adapters: dict[int, _Adapter] = {}
        self._retiring: set[int] = set()
        """Versions that take no new requests and still answer old ones."""
        self._busy: Counter[int] = Counter()
        """Unfinished requests by version."""
        self._futures: dict[int, set[Future[Generation]]] = {}
        self._state = threading.Condition()
        """Guards what other threads share; notified when a request ends."""
        self._left_behind: list[tuple[float, Path]] = []
        """Folders of unloaded adapters, and when they were unloaded."""
        self.proven = False
        """Set once the server has sampled what it should: until then, its death is an error and not mended."""
        self._deaths = 0
        self._lives = 0
        """How often the server was found or started; tells a request whether it was restarted since."""
        self._outage_s = 0.0
        self._down_since: float | None = None
        self._gone_for_good: EngineDied | None = None
        self._closed = False
        self._folder = self._adapter_folder()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fst-vllm", daemon=True)
        self._thread.start()
        self._mending = asyncio.Lock()
        self._client = VLLMClient(end_ids, max_in_flight=config.max_in_flight, timeout_s=config.request_timeout_s)
        try:
            if server:
                server.start()
            self._wait(self._meet())
            self._load_version(0, base)
        except BaseException:
            self.close()
            raise

    # -- the Engine protocol -----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See `Engine.submit`. Cancelling the future aborts the request in vLLM too."""
        with self._state:
            refusal = self._refusal(request.version)
            if refusal is None:
                self._busy[request.version] += 1
                future = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
                self._futures.setdefault(request.version, set()).add(future)
        if refusal is not None:
            future = Future()
            future.set_exception(refusal)
        else:
            future.add_done_callback(lambda done: self._ended(request.version, done))
        return future

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.publish`. Returns when the server has loaded the adapter.

        Raises:
            EngineError: as many versions are served as `vllm.max_live_versions` allows, or loading failed.
        """
        self._check_open()
        live = sorted(self._adapters.keys() - {0})
        if len(live) >= self.max_live_versions:
            raise EngineError(
                f"policy version {version} cannot be published: {', '.join(map(str, live))} are served, as many as "
                f"vllm.max_live_versions ({self.max_live_versions}) allows; raise it, or drop LMs that "
                "policy.lm_at returned"
            )
        self._load_version(version, tensors)
        self._sweep()

    def _load_version(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        name = f"policy-{version:06d}-{secrets.token_hex(3)}"
        adapter = _Adapter(name, self._folder / name)
        self._write_adapter(tensors, adapter.folder)
        try:
            self._wait(self._load(adapter))
        except BaseException:
            shutil.rmtree(adapter.folder, ignore_errors=True)
            raise
        with self._state:
            self._adapters[version] = adapter

    def retire(self, version: int) -> None:
        """See `Engine.retire`. Waits for the version's requests, unloads it, and only then lets go of its files."""
        with self._state:
            if not version or version not in self._adapters or version in self._retiring:
                return
            self._retiring.add(version)
            drained = self._state.wait_for(lambda: not self._busy[version], DRAIN_S)
            stuck = () if drained else tuple(self._futures[version])
        for future in stuck:
            future.cancel()
        if stuck:
            logger.warning("policy version %d is retired; %d requests for it were cancelled", version, len(stuck))
        with self._state:
            adapter = self._adapters.pop(version, None)
            self._retiring.discard(version)
            self._futures.pop(version, None)
        if adapter is None:  # closed meanwhile
            return
        if not self._gone_for_good and not self._closed:
            # A dead server has unloaded it as well; the next publishing brings a new one up.
            with contextlib.suppress(ServerGone):
                self._wait(self._client.unload_adapter(adapter.name))
        with self._state:
            self._left_behind.append((time.monotonic(), adapter.folder))
        self._sweep()

    def try_adapter(self, tensors: Mapping[str, Tensor], request: GenerationRequest) -> Generation:
        """Sample from an adapter that is no policy version, and unload it again."""
        name = f"probe-{secrets.token_hex(3)}"
        adapter = _Adapter(name, self._folder / name)
        self._write_adapter(tensors, adapter.folder)

        async def sampled() -> Generation:
            await self._client.load_adapter(adapter.name, str(adapter.folder))
            try:
                return await self._client.complete(adapter.name, request)
            finally:
                await self._client.unload_adapter(adapter.name)

        try:
            return self._wait(sampled())
        finally:
            with self._state:
                self._left_behind.append((time.monotonic(), adapter.folder))

    def versions(self) -> frozenset[int]:
        """See `Engine.versions`."""
        with self._state:
            return frozenset(self._adapters.keys() - self._retiring)

    def adapter_name(self, version: int) -> str:
        """The name under which the server knows a version.

        Raises:
            RetiredVersion: it is not served.
        """
        return self._served(version).name

    def adapter_folder(self, version: int) -> Path:
        """Where the files of a version lie that the server was told to read.

        Raises:
            RetiredVersion: it is not served.
        """
        return self._served(version).folder

    def outage_s(self) -> float:
        """See `Engine.outage_s`."""
        since = self._down_since
        return self._outage_s + (time.monotonic() - since if since is not None else 0.0)

    def close(self) -> None:
        """See `Engine.close`. An own server is stopped; from another's, our adapters are unloaded."""
        if self._closed:
            return
        self._closed = True
        with self._state:
            adapters, self._adapters = tuple(self._adapters.values()), {}
        if self.server:
            self.server.stop()
        self._wait(self._leave(adapters))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _served(self, version: int) -> _Adapter:
        adapter = self._adapters.get(version)
        if adapter is None:
            raise RetiredVersion(f"policy version {version} is not served any more")
        return adapter

    # -- one request -------------------------------------------------------------------------------------------

    def _refusal(self, version: int) -> EngineError | None:
        if self._closed:
            return EngineError("the engine is closed")
        if self._gone_for_good:
            return self._gone_for_good
        if version not in self._adapters or version in self._retiring:
            served = ", ".join(map(str, sorted(self._adapters.keys() - self._retiring)))
            return RetiredVersion(f"policy version {version} is not served any more; these are: {served}")
        return None

    async def _answer(self, request: GenerationRequest) -> Generation:
        """Ask the server; once more if it dies meanwhile."""
        try:
            life = self._lives
            try:
                generation = await self._client.complete(self.adapter_name(request.version), request)
            except (ServerGone, AdapterMissing) as error:
                await self._mend(life, error)
                generation = await self._once_more(request)
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed") from None
            raise
        self._deaths = 0
        return generation

    async def _once_more(self, request: GenerationRequest) -> Generation:
        life = self._lives
        try:
            return await self._client.complete(self.adapter_name(request.version), request)
        except (ServerGone, AdapterMissing) as error:
            await self._mend(life, error)  # for those that come after: this request may be what kills it
            raise EngineError(f"the server failed this request twice: {error}") from error

    def _ended(self, version: int, future: Future[Generation]) -> None:
        with self._state:
            self._busy[version] -= 1
            self._futures.get(version, set()).discard(future)
            self._state.notify_all()

    # -- the server's life and death ---------------------------------------------------------------------------

    async def _meet(self) -> None:
        """Connect to the server that runs now, and ask what it serves."""
        await self._client.connect(self.server.url if self.server else self.url, self._key())
        listed = await self._client.models()
        base = next((model for model in listed if not model.get("parent")), None)
        if base is None or not base.get("max_model_len"):
            raise UserError(f"url is {self.url!r}: no vLLM server, or one that lists no base model at /v1/models")
        self.context_length = int(base["max_model_len"])
        self._lives += 1

    async def _load(self, adapter: _Adapter) -> None:
        """Have the server load an adapter; where it died, after it was mended."""
        life = self._lives
        try:
            await self._client.load_adapter(adapter.name, str(adapter.folder))
        except ServerGone as error:
            await self._mend(life, error)
            await self._client.load_adapter(adapter.name, str(adapter.folder))

    async def _mend(self, life: int, error: EngineError) -> None:
        """Bring the server back with all live versions; whoever comes second finds it done.

        Raises:
            EngineDied: it died too often in a row, or another's server did not come back.
        """
        async with self._mending:
            if self._gone_for_good:
                raise self._gone_for_good
            if life != self._lives or self._closed:
                return
            if not self.proven:
                tail = f"; the end of {self.server.log_file}:\n{self.server.log_tail()}" if self.server else ""
                raise EngineError(f"the vLLM server died over its first requests ({error}){tail}") from error
            self._down_since = time.monotonic()
            try:
                while not await self._revived(error):
                    pass
            finally:
                self._outage_s += time.monotonic() - self._down_since
                self._down_since = None

    async def _revived(self, error: EngineError) -> bool:
        """One try at bringing the server back."""
        if self.server and not isinstance(error, AdapterMissing):
            self._deaths += 1
            if self._deaths >= DEATHS:
                self._gone_for_good = EngineDied(
                    f"the vLLM server died {DEATHS} times in a row; the end of {self.server.log_file}:\n"
                    f"{self.server.log_tail()}"
                )
                raise self._gone_for_good from error
            logger.warning("the vLLM server died (%s); starting it again", error)
            try:
                await asyncio.to_thread(self.server.start)
            except EngineError as again:
                logger.warning("%s", again)
                return False
        elif not self.server and not await self._returns():
            text = f"the vLLM server at {self.url} is gone and did not come back in {self._config.start_timeout_s:g} s"
            self._gone_for_good = EngineDied(text)
            raise self._gone_for_good from error
        try:
            await self._meet()
            await self._load_again()
        except ServerGone:
            return False
        return True

    async def _load_again(self) -> None:
        """Load every live version that the server does not know."""
        known = {model["id"] for model in await self._client.models()}
        with self._state:
            adapters = [adapter for adapter in self._adapters.values() if adapter.name not in known]
        for adapter in adapters:
            await self._client.load_adapter(adapter.name, str(adapter.folder))

    async def _returns(self) -> bool:
        """Wait for another's server to answer again."""
        deadline = time.monotonic() + self._config.start_timeout_s
        while not await self._client.healthy():
            if time.monotonic() > deadline or self._closed:
                return False
            await asyncio.sleep(1.0)
        return True

    async def _leave(self, adapters: Sequence[_Adapter]) -> None:
        if not self.server:
            for adapter in adapters:
                with contextlib.suppress(EngineError, TimeoutError):
                    await self._client.unload_adapter(adapter.name)
        await self._client.close()
        unfinished = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)

    # -- small things ------------------------------------------------------------------------------------------

    def _key(self) -> str:
        return self.server.api_key if self.server else self._api_key

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._gone_for_good:
            raise self._gone_for_good

    def _wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine in the engine's loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _adapter_folder(self) -> Path:
        where = self._config.adapter_dir
        if where is not None:
            Path(where).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="fst-adapters-", dir=where)).resolve()

    def _sweep(self) -> None:
        """Delete files of adapters that were unloaded some time ago."""
        now = time.monotonic()
        with self._state:
            due = [folder for unloaded, folder in self._left_behind if now - unloaded > LINGER_S]
            self._left_behind = [entry for entry in self._left_behind if entry[1] not in due]
        for folder in due:
            shutil.rmtree(folder, ignore_errors=True)
