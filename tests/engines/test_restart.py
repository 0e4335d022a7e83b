"""What happens when a server dies, with a client and a server that only count."""

import asyncio
import types

import pytest

from fst_optimizer.engines.vllm import restart
from fst_optimizer.engines.vllm.client import AdapterMissing, ServerGone
from fst_optimizer.engines.vllm.restart import ServerConnection
from fst_optimizer.errors import EngineDied, EngineError, UserError

LISTED = [{"id": "base", "max_model_len": 128}, {"id": "policy-000001", "parent": "base"}]


class Client:
    def __init__(self, listed=LISTED, health=()):
        self.listed = listed
        self.health = list(health)
        self.connected = []

    async def connect(self, url, api_key):
        self.connected.append((url, api_key))

    async def models(self):
        return self.listed

    async def healthy(self):
        return self.health.pop(0) if self.health else False


class Server:
    url, api_key = "http://own", "own key"

    def __init__(self, failing_starts=0):
        self.starts = 0
        self.failing_starts = failing_starts

    def start(self):
        self.starts += 1
        if self.starts <= self.failing_starts:
            raise EngineError("the vLLM server ended while it started")

    def end_of_log(self):
        return "the end of server.log: out of memory"


def connection(client=None, server=None, patience_s=60.0):
    """A connection that may restart, and how often adapters were loaded again."""
    loads = types.SimpleNamespace(count=0)

    async def load_adapters():
        loads.count += 1

    made = ServerConnection(client or Client(), server, "http://theirs", "key", patience_s, load_adapters)
    made.restarts_allowed = True
    return made, loads


def failing(*errors, then="answer"):
    """A request that meets these errors, one a try, and is answered after them."""
    left = list(errors)

    async def send():
        if left:
            raise left.pop(0)
        return then

    return send


def gone():
    return ServerGone("connection refused")


def test_a_request_is_sent_again_to_the_restarted_server_with_its_adapters():
    server, client = Server(), Client()
    link, loads = connection(client, server)
    assert asyncio.run(link.ask(failing(gone()))) == "answer"
    assert (server.starts, loads.count) == (1, 1)
    assert client.connected == [("http://own", "own key")]
    assert link.context_length == 128
    assert link.outage_s() > 0


def test_requests_that_notice_one_death_together_restart_the_server_once():
    server = Server()
    link, _ = connection(server=server)

    async def many():
        return await asyncio.gather(*(link.ask(failing(gone())) for _ in range(8)))

    assert asyncio.run(many()) == ["answer"] * 8
    assert server.starts == 1


def test_a_request_that_kills_the_server_twice_fails_and_the_server_is_there_for_the_others():
    server = Server()
    link, _ = connection(server=server)
    with pytest.raises(EngineError, match="failed this request twice: connection refused"):
        asyncio.run(link.ask(failing(gone(), gone())))
    assert server.starts == 2
    assert link.failure is None


def test_three_deaths_without_a_completion_between_them_end_it():
    server = Server()
    link, _ = connection(server=server)
    with pytest.raises(EngineError):
        asyncio.run(link.ask(failing(gone(), gone())))
    for _ in range(2):
        with pytest.raises(EngineDied, match=r"died 3 times in a row; the end of server\.log: out of memory"):
            asyncio.run(link.ask(failing(gone())))
    assert server.starts == 2


def test_a_completion_ends_the_row_of_deaths():
    server = Server()
    link, _ = connection(server=server)
    for _ in range(5):
        asyncio.run(link.ask(failing(gone())))
        link.completed()
    assert server.starts == 5


def test_a_start_that_fails_counts_as_a_death():
    server = Server(failing_starts=1)
    link, _ = connection(server=server)
    assert asyncio.run(link.ask(failing(gone()))) == "answer"
    assert server.starts == 2
    link, _ = connection(server=Server(failing_starts=9))
    with pytest.raises(EngineDied, match="3 times in a row"):
        asyncio.run(link.ask(failing(gone())))


def test_before_restarts_are_allowed_a_death_is_an_error_with_the_log():
    server = Server()
    link, _ = connection(server=server)
    link.restarts_allowed = False
    with pytest.raises(EngineError, match=r"died over its first requests \(connection refused\); the end of server"):
        asyncio.run(link.ask(failing(gone())))
    assert server.starts == 0


def test_a_server_that_only_lacks_an_adapter_is_not_restarted():
    server = Server()
    link, loads = connection(server=server)
    assert asyncio.run(link.ask(failing(AdapterMissing("unknown")))) == "answer"
    assert (server.starts, loads.count) == (0, 1)


def test_anothers_server_is_waited_for(monkeypatch):
    monkeypatch.setattr(restart, "_POLL_S", 0.0)
    client = Client(health=[False, False, True])
    link, loads = connection(client)
    assert asyncio.run(link.ask(failing(gone()))) == "answer"
    assert (client.connected, loads.count) == ([("http://theirs", "key")], 1)


def test_anothers_server_that_does_not_come_back_is_given_up(monkeypatch):
    monkeypatch.setattr(restart, "_POLL_S", 0.0)
    link, _ = connection(patience_s=0.01)
    with pytest.raises(EngineDied, match=r"http://theirs is gone and did not come back in 0\.01 s"):
        asyncio.run(link.ask(failing(gone())))


def test_what_lists_no_base_model_is_no_vllm_server():
    link, _ = connection(Client(listed=[]))
    with pytest.raises(UserError, match="url is 'http://theirs': no vLLM server"):
        asyncio.run(link.open())
