"""Servers on real sockets that do what no vLLM should: break connections off, lie, send without end."""

import contextlib
import json
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fst_optimizer import Policy
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.model.lora import load_adapter_tensors


class Scripted:
    """A server that does to each request what `act(handler, path, count)` does; count is that of the path, from 1."""

    def __init__(self, act):
        self.asked = Counter()
        self.bodies = []
        """Of every request to /v1/completions."""
        self.headers = []
        """Of every request."""
        scripted, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    scripted.asked[self.path] += 1
                    scripted.headers.append(dict(self.headers))
                    if self.path == "/v1/completions":
                        scripted.bodies.append(body)
                    count = scripted.asked[self.path]
                self.body = body
                act(self, self.path, count)

            do_GET = do_POST = _handle

            def answer(self, status, body, **headers):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def reset(self, sent=b""):
                """End the connection with a reset, after these bytes."""
                self.wfile.write(sent)
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()

            def log_message(self, *_):
                pass

            def finish(self):
                with contextlib.suppress(OSError, ValueError):  # the client hung up, or we did
                    super().finish()

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients hang up on what is too long

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class LikeVLLM(Scripted):
    """Answers as vLLM does, by the in-process engine; `change(answer, count)` may change the n-th completion's object.

    What `change` returns is sent: an object as JSON, bytes as they are.
    """

    def __init__(self, model, change=lambda answer, count: answer):
        self.policy = Policy(model)
        self.versions = {"base": 0}
        super().__init__(lambda handler, path, count: self._act(handler, path, count))
        self.change = change

    def _act(self, handler, path, count):
        asked = json.loads(handler.body or b"{}")
        if path == "/health":
            answer = {}
        elif path == "/v1/models":
            base = {"id": "base", "max_model_len": self.policy.engine.context_length, "parent": None}
            answer = {
                "data": [{**base, "id": name, "parent": number and "base"} for name, number in self.versions.items()]
            }
        elif path == "/v1/load_lora_adapter":
            self.versions[asked["lora_name"]] = version = len(self.versions)
            self.policy.engine.publish(version, load_adapter_tensors(asked["lora_path"]))
            answer = {}
        elif path == "/v1/unload_lora_adapter":
            answer = {}
        else:
            answer = self.change(self.completion(asked), count)
        handler.answer(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def completion(self, asked):
        """What vLLM would answer."""
        request = GenerationRequest(
            tuple(asked["prompt"]),
            asked["max_tokens"],
            asked["temperature"],
            tuple(asked["stop"]),
            asked["seed"],
            self.versions[asked["model"]],
        )
        sampled = self.policy.engine.submit(request).result(timeout=60)
        choice = {
            "index": 0,
            "text": self.policy.decode(sampled.completion_ids),
            "logprobs": {"token_logprobs": list(sampled.logprobs)},
            "finish_reason": sampled.finish_reason,
            "token_ids": list(sampled.completion_ids),
            "prompt_token_ids": asked["prompt"],
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": asked["model"], "choices": [choice]}

    def close(self):
        super().close()
        self.policy.close()
