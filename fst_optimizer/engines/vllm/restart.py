"""The connection to a server that may die: an own one is started again, another's is waited for.

Many requests notice a death at once. Each remembers which connection it was sent over; the first to ask restarts the
server, the others wait for that and find a newer connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fst_optimizer.engines.vllm.answers import context_of
from fst_optimizer.engines.vllm.client import AdapterMissing, ServerGone, VLLMClient
from fst_optimizer.engines.vllm.server import VLLMServer
from fst_optimizer.errors import EngineDied, EngineError, UserError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

MAX_DEATHS = 3
"""Deaths of the server in a row, without one completion in between, after which the engine gives up."""
_POLL_S = 1.0


class ServerConnection:
    """Keeps a client connected to a server. All coroutines run in the client's event loop.

    Args:
        client: Sends the requests.
        server: The own server, which is restarted. None: `url` names one that somebody else runs, with its `api_key`.
        patience_s: How long to wait for another's server to come back.
        load_adapters: Has a server that was restarted load what it should serve.
    """

    def __init__(
        self,
        client: VLLMClient,
        server: VLLMServer | None,
        url: str,
        api_key: str,
        patience_s: float,
        load_adapters: Callable[[], Awaitable[None]],
    ) -> None:
        self.client = client
        self.server = server
        self.url = url
        self.patience_s = patience_s
        self.context_length = 0
        self.restarts_allowed = False
        """Until the server has sampled what it should, its death is an error: it would only die again."""
        self.failure: EngineDied | None = None
        """Set when the server is given up."""
        self.closing = False
        self._api_key = api_key
        self._load_adapters = load_adapters
        self._number = 0
        """How often a server was connected to."""
        self._deaths = 0
        """Since the last completion."""
        self._restarting = asyncio.Lock()
        self._outage_s = 0.0
        self._down_since: float | None = None

    async def open(self) -> None:
        """Connect to the server that runs now, and ask what it serves.

        Raises:
            ServerGone: there is none.
            UserError: it is no vLLM server.
        """
        if self.server:
            await self.client.connect(self.server.url, self.server.api_key)
        else:
            await self.client.connect(self.url, self._api_key)
        context = context_of(await self.client.models())
        if context is None:
            raise UserError(f"url is {self.url!r}: no vLLM server, or one that lists no base model at /v1/models")
        self.context_length = context
        self._number += 1

    async def ask(self, send: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Send a request; if the server dies over it, send it once more to the restarted server.

        Raises:
            EngineError: the server died over the second try as well; it is restarted for the requests behind this one.
            EngineDied: the server is given up.
        """
        number = self._number
        try:
            return await send()
        except (ServerGone, AdapterMissing) as error:
            await self._restart(number, error)
        number = self._number
        try:
            return await send()
        except (ServerGone, AdapterMissing) as error:
            await self._restart(number, error)
            raise EngineError(f"the server failed this request twice: {error}") from error

    def completed(self) -> None:
        """A completion came back: the server works, and its deaths are counted anew."""
        self._deaths = 0

    def outage_s(self) -> float:
        """Seconds so far in which there was no server."""
        since = self._down_since
        return self._outage_s + (time.monotonic() - since if since is not None else 0.0)

    async def _restart(self, number: int, error: EngineError) -> None:
        """Get a server that works, with all adapters, unless that was done since connection `number`."""
        async with self._restarting:
            if self.failure:
                raise self.failure
            if number != self._number or self.closing:
                return
            if not self.restarts_allowed:
                log = f"; {self.server.end_of_log()}" if self.server else ""
                raise EngineError(f"the vLLM server died over its first requests ({error}){log}") from error
            self._down_since = time.monotonic()
            try:
                while not await self._try_restart(error):
                    pass
            finally:
                self._outage_s += time.monotonic() - self._down_since
                self._down_since = None

    async def _try_restart(self, error: EngineError) -> bool:
        if self.server is None:
            if not await self._came_back():
                text = f"the vLLM server at {self.url} is gone and did not come back in {self.patience_s:g} s"
                raise self._give_up(text) from error
        elif not isinstance(error, AdapterMissing):  # else it was restarted already, and only lacks the adapters
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                raise self._give_up(
                    f"the vLLM server died {MAX_DEATHS} times in a row; {self.server.end_of_log()}"
                ) from error
            logger.warning("the vLLM server died (%s); starting it again", error)
            try:
                await asyncio.to_thread(self.server.start)
            except EngineError as failed:
                logger.warning("%s", failed)
                return False
        try:
            await self.open()
            await self._load_adapters()
        except ServerGone:
            return False
        return True

    def _give_up(self, text: str) -> EngineDied:
        self.failure = EngineDied(text)
        return self.failure

    async def _came_back(self) -> bool:
        """Wait for another's server to answer again."""
        deadline = time.monotonic() + self.patience_s
        while not await self.client.healthy():
            if time.monotonic() > deadline or self.closing:
                return False
            await asyncio.sleep(_POLL_S)
        return True
