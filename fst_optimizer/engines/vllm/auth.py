"""ASGI middleware for vLLM's server: the API key is asked for on every path, not only below `/v1`.

vLLM 0.32 asks for it below `/v1` and `/inference`, and leaves `/adapters`, which loads any folder as an adapter, and
`/invocations`, which generates, open to everyone who reaches the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = "/health"
"""Tells nothing but that the server is there; `/version` would name what can be attacked, and `/ping` is not asked."""


class RequireKey:
    """Refuses what does not carry the bearer token in the environment variable VLLM_API_KEY."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401; a websocket is closed before it is accepted."""
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and scope["path"] == OPEN) or self._has_key(scope):
            await self.app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _has_key(self, scope: Scope) -> bool:
        return hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self.expected)
