"""A server on this machine that speaks OpenAI's chat completions, as an API model's provider does."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dspy

from fst_optimizer.testing import chat_answer

USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
ANSWER = chat_answer(middle="right", answer="right", score="1")


class API:
    """What the server was asked, and how it answers.

    Args:
        usage: Gives the `usage` of the call of that number, from 1; None: the answer has none.
        status: Of every answer. 401: the body repeats the request's headers, as some proxies do.
    """

    def __init__(self, usage=lambda number: USAGE, status=200):
        self.usage, self.status = usage, status
        self.calls = 0
        self.url = ""
        self._lock = threading.Lock()

    def lm(self, model="openai/gpt-4o-mini", **settings):
        given = {"api_key": "none", "cache": False, "num_retries": 0, **settings}
        return dspy.LM(model, **{"api_base": self.url, **given})

    def answer(self, headers, body):
        with self._lock:
            self.calls += 1
            number = self.calls
        if self.status != 200:
            return {"error": {"message": f"refused: {dict(headers)}", "type": "auth", "code": str(self.status)}}
        usage = self.usage(number)
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        told = {} if usage is None else {"usage": usage}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            **told,
        }


def chunks_of(answer):
    """An answer as OpenAI streams it."""
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    words = answer["choices"][0]["message"]["content"]
    yield {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": words}, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    if "usage" in answer:
        yield {**head, "choices": [], "usage": answer["usage"]}


@contextmanager
def served(api):
    """The server, listening at `api.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            found = api.answer(self.headers, body)
            if body.get("stream") and api.status == 200:
                data = "".join(f"data: {json.dumps(one)}\n\n" for one in chunks_of(found)) + "data: [DONE]\n\n"
                kind = "text/event-stream"
            else:
                data, kind = json.dumps(found), "application/json"
            self.send_response(api.status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data.encode())))
            self.end_headers()
            self.wfile.write(data.encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
