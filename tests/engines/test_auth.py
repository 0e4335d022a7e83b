import asyncio

from fst_optimizer.engines.vllm.auth import RequireKey


class App:
    """Answers 200 to everything."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def sent_by(middleware, path, *headers, kind="http"):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(middleware(scope, None, send))
    return sent


def status_of(middleware, path, *headers):
    return sent_by(middleware, path, *headers)[0]["status"]


def test_only_the_health_of_a_server_is_told_without_its_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    middleware = RequireKey(App())
    assert status_of(middleware, "/health") == 200
    for path in ("/v1/models", "/adapters", "/invocations", "/v1/load_lora_adapter", "/health/", "/version", "/ping"):
        assert status_of(middleware, path) == 401
        assert status_of(middleware, path, ("authorization", "Bearer wrong")) == 401
        assert status_of(middleware, path, ("authorization", "secret")) == 401
        assert status_of(middleware, path, ("authorization", "Bearer secret")) == 200


def test_a_websocket_without_the_key_is_closed_before_it_is_accepted(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    middleware = RequireKey(App())
    for path in ("/v1/realtime", "/health"):
        assert [message["type"] for message in sent_by(middleware, path, kind="websocket")] == ["websocket.close"]
    key = ("authorization", "Bearer secret")
    assert sent_by(middleware, "/v1/realtime", key, kind="websocket")[0]["type"] != "websocket.close"
