import asyncio

from fst_optimizer.engines.vllm.auth import RequireKey


class App:
    """Answers 200 to everything."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def status_of(middleware, path, *headers):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(middleware(scope, None, send))
    return sent[0]["status"]


def test_only_the_health_of_a_server_is_told_without_its_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    middleware = RequireKey(App())
    assert status_of(middleware, "/health") == 200
    for path in ("/v1/models", "/adapters", "/invocations", "/v1/load_lora_adapter", "/health/"):
        assert status_of(middleware, path) == 401
        assert status_of(middleware, path, ("authorization", "Bearer wrong")) == 401
        assert status_of(middleware, path, ("authorization", "secret")) == 401
        assert status_of(middleware, path, ("authorization", "Bearer secret")) == 200
