"""The requests that go to a vLLM server, and what its answers mean.

Token ids go in and token ids come out: `/v1/completions` takes a prompt as ids, and `return_token_ids` gives the
sampled ones back with their log-probs, the end-of-turn token included.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt

from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import EngineError

OVERLOADED = (429, 503)
BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 30.0
OVERLOAD_TRIES = 8
"""How often one request may be turned away before it fails; two minutes in all."""
_SEED_BITS = (1 << 63) - 1
_CONTROL_S = 120.0
"""Limit of a request that loads or lists something, in seconds."""


class ServerGone(EngineError):
    """The connection broke or was refused: the server may have died."""


class AdapterMissing(EngineError):
    """The server does not know an adapter that it was given: it was started anew in between."""


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    body: bytes
    retry_after_s: float | None = None
    """After how many seconds the server wants to be asked again, where it says so."""

    @property
    def message(self) -> str:
        """The words in an error's body."""
        try:
            error = json.loads(self.body)
            error = error.get("error", error)
            return str(error.get("message", error) if isinstance(error, Mapping) else error)[:500]
        except (ValueError, AttributeError):
            return self.body[:500].decode(errors="replace")


class VLLMClient:
    """Sends requests to one server at a time; `connect` moves it to another. All coroutines run in one event loop.

    Args:
        end_ids: The tokens that end a turn, which vLLM would else take from the tokenizer alone.
        max_in_flight, timeout_s: `max_in_flight` and `request_timeout_s` of `VLLMConfig`.
    """

    def __init__(self, end_ids: Sequence[int], *, max_in_flight: int, timeout_s: float) -> None:
        self.end_ids = list(end_ids)
        self.timeout_s = timeout_s
        self._places = asyncio.Semaphore(max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._paused_until = 0.0
        """Loop time before which no request is sent, because the server is overloaded."""
        self._refusals = 0
        """Requests turned away in a row, over all that are in flight."""

    async def connect(self, url: str, api_key: str) -> None:
        """Send to this server from now on."""
        await self.close()
        self._url = url
        self._refusals, self._paused_until = 0, 0.0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            headers={"Authorization": f"Bearer {api_key}"},
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
            ServerGone: the connection broke.
            AdapterMissing: the server does not know `model`.
            EngineError: the server refused the request, or was overloaded for too long.
        """
        body = completion_body(model, request, self.end_ids)
        async with self._places:
            answer = await self._post_unless_overloaded(body)
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
        return generation_of(answer.body)

    async def _post_unless_overloaded(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a request, which is sent again while the server is overloaded; after the last try, whatever."""
        answer: Answer = await AsyncRetrying(
            retry=retry_if_result(lambda answer: answer.status in OVERLOADED),
            stop=stop_after_attempt(OVERLOAD_TRIES),
            wait=lambda state: self._pause_s(_answer_of(state)),
            sleep=self._pause_all,
            retry_error_callback=_answer_of,
        )(self._post_completion, body)
        return answer

    async def _post_completion(self, body: Mapping[str, Any]) -> Answer:
        await self._pause_all(0.0)
        try:
            answer = await self._send("POST", "/v1/completions", body)
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
        if answer.status not in ((200, 404) if verb == "unload" else (200,)):
            where = f" from {more['lora_path']!r}" if more else ""
            raise EngineError(f"the server did not {verb} adapter {name!r}{where} ({answer.status}): {answer.message}")

    async def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: the base first, then adapters.

        Raises:
            ServerGone: no answer.
            EngineError: the server does not take the key.
        """
        try:
            answer = await self._send("GET", "/v1/models", timeout_s=_CONTROL_S)
        except TimeoutError as error:
            raise ServerGone(f"no answer from {self._url} within {_CONTROL_S:g} s") from error
        if answer.status != 200:
            raise EngineError(f"the server answered {answer.status} to /v1/models: {answer.message}")
        listed: list[dict[str, Any]] = json.loads(answer.body)["data"]
        return listed

    async def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return (await self._send("GET", "/health", timeout_s=5.0)).status == 200
        except (EngineError, TimeoutError):
            return False

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Answer:
        """One HTTP request.

        Raises:
            ServerGone: no connection, or it broke.
            TimeoutError: no answer in time.
        """
        if self._session is None:
            raise ServerGone("not connected to a server")
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout_s or self.timeout_s),
            ) as reply:
                return Answer(reply.status, await reply.read(), retry_after_s(reply.headers.get("Retry-After")))
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGone(f"no answer from {self._url}: {type(error).__name__}: {error}") from error


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


def generation_of(text: bytes) -> Generation:
    """The sampled tokens in an answer of `/v1/completions`.

    Raises:
        EngineError: it has no token ids or log-probs, or not one log-prob a token.
    """
    try:
        choice = json.loads(text)["choices"][0]
        token_ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"the server's answer has no token ids and log-probs: {text[:200]!r}") from error
    if not token_ids or len(token_ids) != len(logprobs):
        raise EngineError(f"the server sent {len(token_ids or ())} token ids with {len(logprobs)} log-probs")
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Generation(tuple(token_ids), tuple(min(0.0, float(logprob)) for logprob in logprobs), finish)


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
