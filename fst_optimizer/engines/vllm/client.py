"""The requests that go to a vLLM server, and what its answers mean.

Token ids go in and token ids come out: `/v1/completions` takes a prompt as ids, and `return_token_ids` gives the
sampled ones back with their log-probs, the end-of-turn token included.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

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


class VLLMClient:
    """Speaks to one server at a time; `connect` moves it to another. All coroutines run in one event loop.

    Args:
        end_ids: The tokens that end a turn, which vLLM would else take from the tokenizer alone.
        max_in_flight: Requests that the server is given at once.
        timeout_s: After how many seconds without an answer a request counts as lost to overload.
    """

    def __init__(self, end_ids: Sequence[int], *, max_in_flight: int, timeout_s: float) -> None:
        self.end_ids = list(end_ids)
        self.timeout_s = timeout_s
        self._places = asyncio.Semaphore(max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._open_at = 0.0
        """Loop time before which nothing more is sent: the server said that it is overloaded."""
        self._turned_away = 0
        """Answers of overload in a row."""

    async def connect(self, url: str, api_key: str) -> None:
        """Speak to this server from now on."""
        await self.close()
        self._url = url
        self._turned_away, self._open_at = 0, 0.0
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
            status, text = await self._when_not_overloaded("/v1/completions", body)
        if status == 404:
            raise AdapterMissing(f"the server does not know {model!r}: {message_of(text)}")
        if status >= 500 and not await self.healthy():
            raise ServerGone(f"the server broke down: {message_of(text)}")
        if status != 200:
            raise EngineError(f"the server answered {status}: {message_of(text)}")
        return generation_of(text)

    async def _when_not_overloaded(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Post until the server has room, all requests waiting together."""
        loop = asyncio.get_running_loop()
        for _ in range(OVERLOAD_TRIES):
            while (wait_s := self._open_at - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            try:
                status, text, told_s = await self._post(path, body)
            except TimeoutError:
                status, text, told_s = 429, b"no answer in time", None
            if status not in OVERLOADED:
                self._turned_away = 0
                return status, text
            self._turned_away += 1
            pause_s = backoff_s(self._turned_away, random.random()) if told_s is None else told_s
            self._open_at = max(self._open_at, loop.time() + pause_s)
        raise EngineError(
            f"the server is overloaded: it turned a request away {OVERLOAD_TRIES} times, the last time "
            f"with {message_of(text)!r}; lower vllm.max_in_flight or rollout.num_threads"
        )

    # -- adapters ----------------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, folder: str) -> None:
        """Have the server load a LoRA folder under a name that it never had before."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": False}
        status, text = await self._order("/v1/load_lora_adapter", body)
        if status != 200:
            raise EngineError(
                f"the server did not load adapter {name!r} from {folder!r} ({status}): {message_of(text)}"
            )

    async def unload_adapter(self, name: str) -> None:
        """Have the server forget a name; one that it does not know is no error."""
        status, text = await self._order("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise EngineError(f"the server did not unload adapter {name!r} ({status}): {message_of(text)}")

    async def _order(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        try:
            status, text, _ = await self._post(path, body, _CONTROL_S)
        except TimeoutError as error:
            raise EngineError(f"the server did not answer {path} within {_CONTROL_S:g} s") from error
        return status, text

    async def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: the base first, then adapters.

        Raises:
            EngineError: the server does not take the key.
        """
        status, text = await self._get("/v1/models")
        if status != 200:
            raise EngineError(f"the server answered {status} to /v1/models: {message_of(text)}")
        listed: list[dict[str, Any]] = json.loads(text)["data"]
        return listed

    async def version(self) -> str:
        """The server's vLLM version, "" where it does not tell."""
        status, text = await self._get("/version")
        return str(json.loads(text).get("version", "")) if status == 200 else ""

    async def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return (await self._get("/health", 5.0))[0] == 200
        except EngineError:
            return False

    # -- the wire ----------------------------------------------------------------------------------------------

    async def _post(
        self, path: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[int, bytes, float | None]:
        """Status, body, and after how many seconds the server wants to be asked again."""
        try:
            async with self._connected().post(
                self._url + path,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s or self.timeout_s),
            ) as answer:
                return answer.status, await answer.read(), retry_after_s(answer.headers.get("Retry-After"))
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGone(f"no answer from {self._url}: {type(error).__name__}: {error}") from error

    async def _get(self, path: str, timeout_s: float = _CONTROL_S) -> tuple[int, bytes]:
        try:
            async with self._connected().get(
                self._url + path, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ServerGone(f"no answer from {self._url}: {type(error).__name__}: {error}") from error

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise ServerGone("not connected to a server")
        return self._session


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


def backoff_s(times: int, luck: float) -> float:
    """How long to wait after being turned away `times` times in a row: doubling, half of it left to luck in [0, 1)."""
    longest = min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** (times - 1))
    return longest * (0.5 + 0.5 * luck)


def retry_after_s(header: str | None) -> float | None:
    """Seconds in a Retry-After header, at most `LONGEST_BACKOFF_S`; None where it says none."""
    try:
        return None if header is None else min(max(0.0, float(header)), LONGEST_BACKOFF_S)
    except ValueError:
        return None  # a date, which vLLM does not send


def message_of(text: bytes) -> str:
    """The words in an error's body."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, Mapping) else error)[:500]
    except (ValueError, AttributeError):
        return text[:500].decode(errors="replace")
