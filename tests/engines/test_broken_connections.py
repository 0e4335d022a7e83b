"""Connections that break while the server is well, on real sockets; then a real vLLM server behind a relay."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from fst_optimizer import Policy
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import server as vllm_server
from fst_optimizer.engines.vllm.address import proxy_for
from fst_optimizer.engines.vllm.client import ServerGone, VLLMClient
from fst_optimizer.engines.vllm.restart import ServerConnection
from fst_optimizer.errors import EngineError
from helpers.hostile import Scripted

REQUEST = GenerationRequest((1, 2, 3), 4, seed=5)
CHOICE = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.1]}, "finish_reason": "stop"}
ANSWER = json.dumps({"model": "base", "choices": [CHOICE]}).encode()


@pytest.fixture
def serve():
    """Makes servers that are well, but do `act(handler, count)` to a completion; what that leaves is answered."""
    made = []

    def make(act, health=lambda handler, count: handler.answer(200, b"")):
        def whole(handler, path, count):
            if path == "/health":
                health(handler, count)
            elif path == "/v1/completions" and act(handler, count) is None:
                handler.answer(200, ANSWER)

        made.append(Scripted(whole))
        return made[-1]

    yield make
    for server in made:
        server.close()


def broken(first, last=10**6, sent=b""):
    """Resets the connections of the completions from the first to the last one."""

    def act(handler, count):
        if not first <= count <= last:
            return None
        handler.reset(sent)
        return "done"

    return act


def run(url, work):
    async def connected():
        client = VLLMClient([2], vocabulary=10, max_in_flight=8, timeout_s=60.0)
        await client.connect(url, "key")
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(connected())


def complete(client):
    return client.complete("base", REQUEST)


HALF = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"model": "base", "choi'


@pytest.mark.parametrize("sent", [b"", HALF], ids=["before the answer", "within the answer"])
def test_a_healthy_server_is_sent_the_same_request_again(serve, sent):
    server = serve(broken(1, 1, sent))
    assert run(server.url, complete).completion_ids == (7, 2)
    assert server.asked == {"/v1/completions": 2, "/health": 1}
    assert server.bodies[0] == server.bodies[1]  # the seed is in it


def test_a_request_that_a_healthy_server_breaks_off_every_time_is_an_engine_error(serve):
    server = serve(broken(1))
    with pytest.raises(EngineError, match="is well and broke off POST /v1/completions 3 times") as refused:
        run(server.url, complete)
    assert not isinstance(refused.value, ServerGone)  # that would restart it
    assert server.asked["/v1/completions"] == 3


def test_a_server_that_takes_its_time_to_say_that_it_is_well_is_well(serve):
    def slow(handler, count):
        time.sleep(5.5)
        handler.answer(200, b"")

    assert run(serve(broken(1, 1), slow).url, complete).completion_ids == (7, 2)


def test_a_question_after_its_health_that_breaks_is_asked_again(serve):
    def once(handler, count):
        if count == 1:
            handler.reset()
        else:
            handler.answer(200, b"")

    assert run(serve(broken(1, 1), once).url, complete).completion_ids == (7, 2)


def test_a_server_that_is_not_well_is_gone(serve):
    server = serve(broken(1), lambda handler, count: handler.answer(503, b""))
    with pytest.raises(ServerGone, match="no answer from"):
        run(server.url, complete)
    assert server.asked["/v1/completions"] == 1


class Own:
    """A server that counts its starts."""

    api_key = "key"

    def __init__(self, url):
        self.url, self.starts = url, 0

    def start(self):
        self.starts += 1


@pytest.mark.parametrize("own", [True, False], ids=["own", "attached"])
def test_three_connections_that_break_neither_restart_nor_end_anything(serve, own):
    server = serve(lambda handler, count: broken(count)(handler, count) if count % 2 else None)
    owner = Own(server.url) if own else None

    async def ask_three_times():
        client = VLLMClient([2], vocabulary=10, max_in_flight=8, timeout_s=60.0)
        link = ServerConnection(client, owner, server.url, "key", 60.0, lambda: None)
        link.restarts_allowed = True
        await client.connect(server.url, "key")
        answers = [await link.ask(lambda: complete(client)) for _ in range(3)]
        await client.close()
        return answers, link

    answers, link = asyncio.run(ask_three_times())
    assert [answer.completion_ids for answer in answers] == [(7, 2)] * 3
    assert (link.outage_s(), link.failure) == (0.0, None)
    assert owner is None or owner.starts == 0
    assert "/v1/models" not in server.asked  # connected once


def test_an_adapter_whose_loading_was_not_heard_of_is_loaded_once(tmp_path):
    loaded = []

    def act(handler, path, count):
        if path == "/v1/load_lora_adapter":
            name = json.loads(handler.body)["lora_name"]
            if name in loaded:
                handler.answer(400, b'{"error": {"message": "has already been loaded"}}')
            else:
                loaded.append(name)
                handler.reset()
        elif path == "/v1/models":
            handler.answer(200, json.dumps({"data": [{"id": name} for name in ["base", *loaded]]}).encode())
        else:
            handler.answer(200, b"")

    server = Scripted(act)
    run(server.url, lambda client: client.load_adapter(tmp_path / "policy-000001-abcdef"))
    server.close()
    assert server.asked["/v1/load_lora_adapter"] == 2
    assert loaded == ["policy-000001-abcdef"]


# -- proxies --------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(monkeypatch):
    """An environment whose proxy nobody listens at."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def test_a_server_on_loopback_is_healthy_whatever_proxy_the_environment_names(serve, proxied, monkeypatch):
    monkeypatch.setattr(vllm_server, "check_version", lambda: None)
    server = serve(lambda handler, count: None)
    assert vllm_server.VLLMServer("some/model", port=server.port).healthy()
    assert run(server.url, complete).completion_ids == (7, 2)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:8000", None),
        ("http://127.8.9.1:8000", None),
        ("http://localhost:8000", None),
        ("http://[::1]:8000", None),
        ("http://gpu-box:8000", "http://127.0.0.1:9"),
        ("http://10.0.0.5:8000", "http://127.0.0.1:9"),
        ("https://gpu-box:8000", None),
        ("http://user@near.example:8000", None),
    ],
)
def test_only_loopback_and_what_the_environment_excepts_go_without_its_proxy(proxied, monkeypatch, url, proxy):
    monkeypatch.setenv("no_proxy", "near.example")
    assert proxy_for(url) == proxy


def test_a_server_elsewhere_is_asked_through_the_environments_proxy(monkeypatch, proxied):
    proxy = Scripted(lambda handler, path, count: handler.answer(200, ANSWER))
    monkeypatch.setenv("http_proxy", proxy.url)
    assert run("http://gpu-box.invalid:8000", complete).completion_ids == (7, 2)
    proxy.close()
    assert list(proxy.asked) == ["http://gpu-box.invalid:8000/v1/completions"]


# -- a real server --------------------------------------------------------------------------------------------------


class Relay:
    """Passes connections on to a port, but resets those of the next `left` completions as soon as they are asked."""

    def __init__(self, port):
        self.port, self.left, self.broke = port, 0, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one, other):
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
                if b"POST /v1/completions" in data and self.left:
                    self.left, self.broke = self.left - 1, self.broke + 1
                    break
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listening.close()


def test_a_real_servers_tokens_are_the_same_after_a_broken_connection(vllm_server, tiny_model):
    relay = Relay(vllm_server.port)
    policy = Policy(tiny_model, engine="vllm", url=relay.url, api_key=vllm_server.api_key)
    prompt_ids = policy.encode_chat([{"role": "user", "content": "What comes next?"}])
    requests = [GenerationRequest(prompt_ids, 24, seed=seed) for seed in range(8)]
    whole = [policy.engine.submit(request).result(timeout=60) for request in requests]
    for _ in range(3):
        relay.left = 2
        futures = [policy.engine.submit(request) for request in requests]
        again = [future.result(timeout=60) for future in futures]
        assert [one.completion_ids for one in again] == [one.completion_ids for one in whole]
    assert relay.broke == 6
    assert policy.engine.outage_s() == 0.0
    policy.close()
    relay.close()
