"""The requests that go to a vLLM server.

Token ids go in and token ids come out: `/v1/completions` takes a prompt as ids, and `return_token_ids` gives the
sampled ones back with their log-probs, the end-of-turn token included.

A broken connection is not a dead server: `/health` is asked, and from a server that is well the same is asked again. A
completion's seed is in its request, so the second answer has the tokens that the first would have had.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.engines.vllm.address import proxy_for
from fst_optimizer.engines.vllm.answers import CONTROL_BYTES, Answer, body_limit, generation_of, models_of
from fst_optimizer.errors import EngineError

logger = logging.getLogger(__name__)

OVERLOADED = (429, 503)
BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 30.0
OVERLOAD_TRIES = 8
"""How often one request may be turned away before it fails; two minutes in all."""
_SEED_BITS = (1 << 63) - 1
_CONTROL_S = 120.0
"""Limit of a request that loads or lists something, in seconds."""
BODY_S = 60.0
"""How long an answer may take from its first byte to its last."""
HEALTH_S = 30.0
"""How long a server may take to say that it is well; under load its front is slow."""
RESENDS = 2
"""How often a healthy server is sent again what it broke off."""
RESEND_S = 0.2
"""Before a broken connection's second try, and twice as long before each further one."""


class ServerGone(EngineError):
    """The connection broke or was refused: the server may have died."""


class AdapterMissing(EngineError):
    """The server does not know an adapter that it was given: it was started anew in between."""


class VLLMClient:
    """Sends requests to one server at a time; `connect` moves it to another. All coroutines run in one event loop.

    Args:
        end_ids: The tokens that end a turn, which vLLM would else take from the tokenizer alone.
        vocabulary: Rows of the model's embedding; no token that is sampled is at or above it.
        max_in_flight, timeout_s: `max_in_flight` and `request_timeout_s` of `VLLMConfig`.
    """

    def __init__(self, end_ids: Sequence[int], *, vocabulary: int, max_in_flight: int, timeout_s: float) -> None:
        self.end_ids = list(end_ids)
        self.vocabulary = vocabulary
        self.timeout_s = timeout_s
        self._places = asyncio.Semaphore(max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._proxy: str | None = None
        self._paused_until = 0.0
        """Loop time before which no request is sent, because the server is overloaded."""
        self._refusals = 0
        """Requests turned away in a row, over all that are in flight."""

    async def connect(self, url: str, api_key: str) -> None:
        """Send to this server from now on."""
        await self.close()
        self._url, self._proxy = url, proxy_for(url)
        self._refusals, self._paused_until = 0, 0.0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            # Compressed, a small answer could become one that no limit on bytes had seen.
            headers={"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
        )

    async def close(self) -> None:
        """Drop all connections; the server aborts what it was sampling for them."""
        session, self._session = self._session, None
        if session:
            await session.close()

    # -- sampling ----------------------------------------------------------------------------------------------

    async def complete(self, model: str, request: GenerationRequest) -> Generation:
        """Sample one completion from `model`, the base's name or an adapter's.

        Raises:
            ServerGone: the connection broke, and the server is not well.
            AdapterMissing: the server does not know `model`.
            EngineError: the server refused the request, was overloaded for too long, broke it off each time while it
                was well, or gave an answer that cannot be.
        """
        body = completion_body(model, request, self.end_ids)
        async with self._places:
            answer = await self._post_unless_overloaded(body, body_limit(request))
        if answer.status in OVERLOADED:
            raise EngineError(
                f"the server is overloaded: it turned a request away {OVERLOAD_TRIES} times, the last time "
                f"with {answer.message!r}; lower vllm.max_in_flight or rollout.num_threads"
            )
        if answer.status == 404:
            raise AdapterMissing(f"the server does not know {model!r}: {answer.message}")
        if answer.status >= 500 and not await self.healthy():
            raise ServerGone(f"the server broke down: {answer.message}")
        if answer.status != 200:
            raise EngineError(f"the server answered {answer.status}: {answer.message}")
        return generation_of(answer.body, model, request, vocabulary=self.vocabulary, end_ids=self.end_ids)

    async def _post_unless_overloaded(self, body: Mapping[str, Any], limit: int) -> Answer:
        """The answer to a request, which is sent again while the server is overloaded; after the last try, whatever."""
        answer: Answer = await AsyncRetrying(
            retry=retry_if_result(lambda answer: answer.status in OVERLOADED),
            stop=stop_after_attempt(OVERLOAD_TRIES),
            wait=lambda state: self._pause_s(_answer_of(state)),
            sleep=self._pause_all,
            retry_error_callback=_answer_of,
        )(self._post_completion, body, limit)
        return answer

    async def _post_completion(self, body: Mapping[str, Any], limit: int) -> Answer:
        await self._pause_all(0.0)
        try:
            answer = await self._send("POST", "/v1/completions", body, limit=limit)
        except TimeoutError:
            answer = Answer(429, b"no answer in time")
        self._refusals = self._refusals + 1 if answer.status in OVERLOADED else 0
        return answer

    def _pause_s(self, refusal: Answer) -> float:
        return backoff_s(self._refusals, random.random()) if refusal.retry_after_s is None else refusal.retry_after_s

    async def _pause_all(self, seconds: float) -> None:
        """Hold all requests back for so long, and wait until that and every other pause is over."""
        loop = asyncio.get_running_loop()
        self._paused_until = max(self._paused_until, loop.time() + seconds)
        while (left_s := self._paused_until - loop.time()) > 0:
            await asyncio.sleep(left_s)

    # -- adapters ----------------------------------------------------------------------------------------------

    async def load_adapter(self, folder: Path) -> None:
        """Have the server load a LoRA folder under the folder's name, which it never had before."""
        await self._order("load", folder.name, lora_path=str(folder), load_inplace=False)

    async def unload_adapter(self, name: str) -> None:
        """Have the server forget a name; one that it does not know is no error."""
        await self._order("unload", name)

    async def _order(self, verb: str, name: str, **more: Any) -> None:
        path = f"/v1/{verb}_lora_adapter"
        try:
            answer = await self._send("POST", path, {"lora_name": name, **more}, timeout_s=_CONTROL_S)
        except TimeoutError as error:
            raise EngineError(f"the server did not answer {path} within {_CONTROL_S:g} s") from error
        done = (200, 404) if verb == "unload" else (200,)
        # Where the answer to a first try was lost, the second is told that the name is taken: by us, it is new.
        if answer.status not in done and not (verb == "load" and await self._lists(name)):
            where = f" from {more['lora_path']!r}" if more else ""
            raise EngineError(f"the server did not {verb} adapter {name!r}{where} ({answer.status}): {answer.message}")

    async def _lists(self, name: str) -> bool:
        return any(model["id"] == name for model in await self.models())

    async def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: the base first, then adapters.

        Raises:
            ServerGone: no answer.
            EngineError: the server does not take the key, or is none that lists models.
        """
        try:
            answer = await self._send("GET", "/v1/models", timeout_s=_CONTROL_S)
        except TimeoutError as error:
            raise ServerGone(f"no answer from {self._url} within {_CONTROL_S:g} s") from error
        if answer.status != 200:
            raise EngineError(f"the server answered {answer.status} to /v1/models: {answer.message}")
        return models_of(answer.body)

    async def healthy(self) -> bool:
        """Whether the server answers and its engine lives. A connection that breaks is no answer yet."""
        for wait_s in _waits():
            await asyncio.sleep(wait_s)
            try:
                return (await self._send_once("GET", "/health", timeout_s=HEALTH_S)).status == 200
            except ServerGone:
                continue
            except (EngineError, TimeoutError):
                break
        return False

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        limit: int = CONTROL_BYTES,
    ) -> Answer:
        """One HTTP request, sent again where its connection breaks and the server is well.

        Raises:
            ServerGone: no connection, or it broke, and the server is not well.
            EngineError: it broke each time; or the answer is no answer that could be read.
            TimeoutError: no answer in time.
        """
        for wait_s in _waits():
            await asyncio.sleep(wait_s)
            try:
                return await self._send_once(method, path, body, timeout_s=timeout_s, limit=limit)
            except ServerGone as error:
                broke = error
            if not await self.healthy():
                raise broke
            logger.info("a connection to the vLLM server broke, which is well: %s", broke)
        raise EngineError(f"the server is well and broke off {method} {path} {RESENDS + 1} times: {broke}") from broke

    async def _send_once(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        limit: int = CONTROL_BYTES,
    ) -> Answer:
        if self._session is None:
            raise ServerGone("not connected to a server")
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                proxy=self._proxy,
                allow_redirects=False,  # what another address answers was not sampled here, and it would get the key
                timeout=aiohttp.ClientTimeout(total=timeout_s or self.timeout_s),
            ) as reply:
                return Answer(reply.status, await _read(reply, limit), retry_after_s(reply.headers.get("Retry-After")))
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGone(f"no answer from {self._url}: {type(error).__name__}: {error}") from error


async def _read(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """An answer's body, of at most `limit` bytes and not compressed. Raises EngineError for any other."""
    packed = reply.headers.get("Content-Encoding", "identity")
    if packed.lower() != "identity":
        raise EngineError(f"the server's answer is compressed ({packed[:40]!r}), which nobody asked for")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in reply.content.iter_any():
                body += part
                if len(body) > limit:
                    reply.close()
                    raise EngineError(f"the server's answer is longer than the {limit} bytes that it may have")
    except TimeoutError as error:
        raise EngineError(f"the server's answer did not end within {BODY_S:g} s of its beginning") from error
    return bytes(body)


def _waits() -> list[float]:
    """Seconds to wait before each try."""
    return [0.0, *(RESEND_S * 2.0**number for number in range(RESENDS))]


def completion_body(model: str, request: GenerationRequest, end_ids: Sequence[int]) -> dict[str, Any]:
    """A request as `/v1/completions` takes it. What would shape the distribution is switched off by name."""
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": request.seed & _SEED_BITS,
        "stop": list(request.stop),
        "stop_token_ids": list(end_ids),
        "include_stop_str_in_output": bool(request.stop),
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def backoff_s(refusals: int, draw: float) -> float:
    """How long to wait after so many refusals in a row: doubling, half of it by a random `draw` in [0, 1).

    tenacity's own strategies count the tries of one request; refusals count over all requests that are in flight.
    """
    longest = min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** (refusals - 1))
    return longest * (0.5 + 0.5 * draw)


def retry_after_s(header: str | None) -> float | None:
    """Seconds in a Retry-After header, at most `LONGEST_BACKOFF_S`; None where it says none."""
    try:
        return None if header is None else min(max(0.0, float(header)), LONGEST_BACKOFF_S)
    except ValueError:
        return None  # a date, which vLLM does not send


def _answer_of(state: RetryCallState) -> Answer:
    assert state.outcome is not None
    answer: Answer = state.outcome.result()
    return answer
