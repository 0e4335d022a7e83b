"""The client's requests, held against servers that answer what a test says; none of them is a vLLM."""

import asyncio
import json
import time
from itertools import pairwise

import pytest

from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import client as vllm_client
from fst_optimizer.engines.vllm.client import AdapterMissing, ServerGone, VLLMClient
from fst_optimizer.errors import EngineError
from helpers.servers import Proxy

CHOICE = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, 1e-6]}, "finish_reason": "stop"}
SAMPLED = {"model": "base", "choices": [CHOICE]}
END, VOCABULARY = 2, 10
FULL = b'{"error": {"message": "full"}}'
REQUEST = GenerationRequest((1, 2, 3), 4)


@pytest.fixture
def serve():
    """Makes servers that answer completions with (status, headers, body), or with what was sampled for None."""
    made = []

    def make(answer):
        def always(path, count):
            if path != "/v1/completions":
                return 404, {}, b"{}"
            return answer(count) or (200, {}, json.dumps(SAMPLED).encode())

        made.append(Proxy("", always))
        return made[-1]

    yield make
    for server in made:
        server.close()


def run(server, work, **settings):
    """What the coroutine `work(client)` returns, with a client of that server."""

    async def connected():
        client = VLLMClient([END], **{"vocabulary": VOCABULARY, "max_in_flight": 256, "timeout_s": 60.0, **settings})
        await client.connect(server.url, "key")
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(connected())


def complete(client):
    return client.complete("base", REQUEST)


def refused(first, last, headers):
    """Turns away the completions from the first to the last one."""
    return lambda count: (429, headers, FULL) if first <= count <= last else None


def times(server):
    return [when for _, when in server.asked]


# -- overload -----------------------------------------------------------------------------------------------------


def test_an_overloaded_server_is_asked_again_after_pauses_that_double(serve):
    server = serve(refused(1, 4, {}))
    assert run(server, complete).completion_ids == (7, 2)
    pauses = [later - earlier for earlier, later in pairwise(times(server))]
    assert len(pauses) == 4
    for pause, least in zip(pauses, (0.125, 0.25, 0.5, 1.0), strict=True):
        assert pause >= least


def test_the_servers_own_word_on_when_to_ask_again_counts(serve):
    server = serve(refused(1, 1, {"Retry-After": "1"}))
    run(server, complete)
    first, second = times(server)
    assert second - first >= 1.0


def test_all_requests_wait_while_the_server_is_overloaded(serve):
    server = serve(refused(1, 1, {"Retry-After": "1"}))

    async def one_then_eight(client):
        first = asyncio.create_task(complete(client))
        while not server.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the refusal is on its way back
        await asyncio.gather(first, *(complete(client) for _ in range(8)))

    run(server, one_then_eight)
    rejected, *later = times(server)
    assert len(later) == 9
    assert min(later) - rejected >= 1.0


def test_a_server_that_stays_overloaded_fails_the_request_and_says_what_to_lower(serve, monkeypatch):
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.001)
    server = serve(refused(1, 10**6, {}))
    with pytest.raises(EngineError, match=r"overloaded: it turned a request away 8 times.*'full'.*max_in_flight"):
        run(server, complete)
    assert len(server.asked) == 8


def test_no_answer_in_time_counts_as_overload(serve, monkeypatch):
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.001)
    server = serve(lambda count: time.sleep(1.0) if count == 1 else None)
    assert run(server, complete, timeout_s=0.3).completion_ids == (7, 2)
    assert len(server.asked) == 2


def test_a_request_is_cancelled_while_it_waits_for_an_overloaded_server(serve):
    server = serve(refused(1, 10**6, {"Retry-After": "30"}))

    async def cancelled(client):
        task = asyncio.create_task(complete(client))
        while not server.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    assert run(server, cancelled) < 5
    assert len(server.asked) == 1


def test_pauses_double_up_to_a_bound():
    assert [vllm_client.backoff_s(refusals, 1.0) for refusals in (1, 2, 3, 20)] == [0.25, 0.5, 1.0, 30.0]
    assert vllm_client.backoff_s(1, 0.0) == 0.125


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, None), ("2", 2.0), ("-1", 0.0), ("3600", 30.0), ("Fri, 01 Jan 2027", None)]
)
def test_retry_after_is_bounded(header, seconds):
    assert vllm_client.retry_after_s(header) == seconds


# -- what answers mean --------------------------------------------------------------------------------------------


def test_a_completion_has_its_tokens_and_logprobs(serve):
    generation = run(serve(lambda count: None), complete)
    assert generation.completion_ids == (7, 2)
    assert generation.logprobs == (-0.5, 0.0)  # rounding may leave one a little above 0
    assert generation.finish_reason == "stop"


def test_an_adapter_that_the_server_does_not_know_is_told_apart(serve):
    with pytest.raises(AdapterMissing, match="does not know 'base': no such model"):
        run(serve(lambda count: (404, {}, b'{"error": {"message": "no such model"}}')), complete)


def test_a_server_error_of_a_server_that_is_not_healthy_is_its_death(serve):
    with pytest.raises(ServerGone, match="broke down: engine died"):
        run(serve(lambda count: (500, {}, b"engine died")), complete)


def test_a_server_that_is_not_there_is_gone(serve):
    server = serve(lambda count: None)
    server.close()
    with pytest.raises(ServerGone, match="no answer from"):
        run(server, complete)
