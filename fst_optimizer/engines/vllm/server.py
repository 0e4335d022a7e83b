"""A vLLM server of our own: started, watched, and stopped with all processes that it started.

    with VLLMServer("Qwen/Qwen3-1.7B", max_lora_rank=16) as server:
        Policy("Qwen/Qwen3-1.7B", engine="vllm", url=server.url, api_key=server.api_key)

`Policy(model, engine="vllm")` does this by itself. What each flag is for is said in `command`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from weakref import WeakSet

from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.engines.vllm import supervisor
from fst_optimizer.engines.vllm.installed import check_version, entry_point, on_cpu, served_rank
from fst_optimizer.engines.vllm.plugin import PATIENT
from fst_optimizer.errors import EngineError
from fst_optimizer.keys import keep_secret
from fst_optimizer.store.folders import TemporaryFolder

logger = logging.getLogger(__name__)

BASE_NAME = "base"
"""The name under which the base model is served."""
SERVED_NAME = "fst-policy"
"""The name under which a finished run's policy is served, and that an exported program asks for."""
EXTRA_ADAPTERS = 2
"""Adapters that a server has room for beside the live versions."""
TAIL_LINES = 30
_POLL_S = 0.2
_STARTS = 3
"""Tries at a start whose port was taken in between."""

OnWait = Callable[[float, str], None]
"""Called while the server starts, with the seconds so far and the log's last line."""


@dataclass(eq=False, repr=False)
class VLLMServer:
    """A vLLM server on loopback, with an API key that only this process knows.

    Raises:
        UserError: vLLM is not installed, or of a version that does not work.
    """

    model: str | Path
    """The base model's folder or hub name."""
    _: KW_ONLY
    max_lora_rank: int | None = None
    """The largest rank of an adapter that will be served; rounded up to what vLLM takes. None: no adapters."""
    config: VLLMConfig = field(default_factory=VLLMConfig)
    """Memory, devices, timeouts and more flags."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, ...; that of the trainer, or log-probs will differ."""
    served_name: str = BASE_NAME
    """The base model's name in requests."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Adapters that are served from the start, name -> folder."""
    runtime_adapters: bool = True
    """Whether adapters may be loaded while it runs."""
    quantization: str | None = None
    """vLLM's name of a quantization of the base. None: as the model is."""
    trust_remote_code: bool = False
    api_key: str = ""
    """Empty: a new random one."""
    host: str = "127.0.0.1"
    """What to listen on. Anything but loopback is reachable by others, with the key."""
    port: int = 0
    """0: a free one."""
    on_wait: OnWait | None = None
    """Told while the server starts."""
    needs: object = None
    """What must not go before it, such as a temporary folder with its adapters."""

    def __post_init__(self) -> None:
        check_version()
        # None means the default, as in the other public constructors.
        self.config, self.adapters, self.port = self.config or VLLMConfig(), self.adapters or {}, self.port or 0
        self.api_key = self.api_key or secrets.token_urlsafe(32)
        keep_secret(self.api_key)
        if self.max_lora_rank is not None:
            self.max_lora_rank = served_rank(self.max_lora_rank)
        self.pid: int | None = None
        """The server's process id, and its process group's."""
        self._any_port = not self.port
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._wanted = False
        """Whether it should run: a stop from another thread ends a start that is under way."""
        self._lock = threading.Lock()
        """Held while the process is made or ended."""
        _MADE.add(self)
        if self.config.log_file is not None:
            self.log_file = Path(self.config.log_file)
        else:
            self._own_folder = TemporaryFolder("fst-vllm-")
            self.log_file = self._own_folder.path / "server.log"

    # -- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server and wait until it answers. A second call restarts it, on a new port.

        Raises:
            EngineError: it ended, or did not answer within `config.start_timeout_s`; with the end of its log.
        """
        self.stop()
        self._wanted = True
        for attempt in range(1, _STARTS + 1):
            if self._any_port:
                self.port = free_port(self.host)
            self._launch()
            try:
                self._wait_until_healthy()
                break
            except BaseException as error:
                taken = "address already in use" in self.log_tail().lower()
                self._end()
                if not (isinstance(error, EngineError) and taken and self._any_port and attempt < _STARTS):
                    raise
        logger.info("vLLM serves %s at %s (process %s, log %s)", self.model, self.url, self.pid, self.log_file)

    def stop(self) -> None:
        """Stop the server with every process that it started; harmless when it does not run."""
        self._wanted = False
        atexit.unregister(self.stop)
        self._end()

    def _end(self) -> None:
        with self._lock:
            running, self._supervisor, self.pid = self._supervisor, None, None
        if running is None:
            return
        assert running.stdin is not None and running.stdout is not None
        with contextlib.suppress(OSError):
            running.stdin.close()  # the supervisor takes it as the order to stop
        try:
            running.wait(supervisor.GRACE_S + 10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        running.stdout.close()

    def forget(self) -> None:
        """In a forked process: let go of the parent's server, which would not stop while we held its pipe open too."""
        running, self._supervisor, self.pid, self._wanted = self._supervisor, None, None, False
        self._lock = threading.Lock()  # a thread that is not here may have held the old one
        if running is not None:
            assert running.stdin is not None and running.stdout is not None
            running.stdin.close()
            running.stdout.close()

    def wait(self) -> None:
        """Wait for as long as the server runs.

        Raises:
            EngineError: it ended by itself; with the end of its log.
        """
        if running := self._supervisor:
            running.wait()
        if self._wanted:
            raise EngineError(f"the vLLM server ended; {self.end_of_log()}")

    def alive(self) -> bool:
        """Whether the server's process runs; it may still be starting."""
        running = self._supervisor
        return running is not None and running.poll() is None

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and its engine lives."""
        # Never through the environment's proxy, which would look for the server on its own loopback.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/health", timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where it listens, without `/v1`."""
        return f"http://{self.host}:{self.port}"

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log."""
        try:
            with self.log_file.open("rb") as handle:
                handle.seek(max(0, self.log_file.stat().st_size - 200 * lines))
                text = handle.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:]).replace(self.api_key, "***")

    def end_of_log(self) -> str:
        """The last lines of its log and where it is, for an error's text."""
        return f"the end of {self.log_file}:\n{self.log_tail()}"

    def command(self) -> list[str]:
        """The command line; the API key is in the environment, where `ps` does not show it."""
        config = self.config
        gpu_share = config.gpu_memory_utilization or (0.45 if config.devices is None else 0.9)
        flags = {
            "--served-model-name": self.served_name,
            "--host": self.host,
            "--port": str(self.port),
            "--dtype": self.dtype,
            # Else the model's own top_p and top_k shape what is sampled.
            "--generation-config": "vllm",
            # Log-probs at the request's temperature, as the trainer computes them.
            "--logprobs-mode": "processed_logprobs",
            "--middleware": "fst_optimizer.engines.vllm.auth.RequireKey",
            "--max-model-len": None if config.max_model_len is None else str(config.max_model_len),
            "--gpu-memory-utilization": None if on_cpu() else str(gpu_share),
            "--quantization": self.quantization,
        }
        switches = ["--disable-uvicorn-access-log"]
        if self.trust_remote_code:
            switches.append("--trust-remote-code")
        if on_cpu():
            # A prompt that is computed in parts rewinds its request's random generator, which torch's CPU generator
            # cannot: the engine dies ("CPU Generator does not use offset", vLLM 0.32).
            switches.append("--no-enable-chunked-prefill")
        if self.max_lora_rank is not None:
            switches.append("--enable-lora")
            flags["--max-lora-rank"] = str(self.max_lora_rank)
            # The live versions, the base, which is served as an adapter too, and one to try adapters with.
            flags["--max-loras"] = str(config.max_live_versions + EXTRA_ADAPTERS)
        if self.adapters:
            switches += ["--lora-modules", *(f"{name}={folder}" for name, folder in self.adapters.items())]
        given = [text for name, value in flags.items() if value is not None for text in (name, value)]
        return [*entry_point(str(self.model)), *given, *switches, *config.flags]

    def environment(self) -> dict[str, str]:
        """The server's environment variables."""
        config = self.config
        package_root = str(Path(__file__).resolve().parents[3])
        own = {
            "VLLM_API_KEY": self.api_key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(self.runtime_adapters and self.max_lora_rank is not None),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": config.cpu_threads,
            # For the middleware, where this package is not installed but lies beside the program.
            "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        }
        if config.devices is not None:
            own["CUDA_VISIBLE_DEVICES"] = config.devices
        if on_cpu():
            own[PATIENT] = "1"
        return {**os.environ, **own}

    # -- starting ----------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.log_file.open("ab") as log:
            if not self._wanted:
                raise EngineError("the vLLM server was stopped while it started")
            self._supervisor = subprocess.Popen(
                [sys.executable, "-E", "-S", supervisor.__file__, *self.command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )
            assert self._supervisor.stdout is not None
            line = self._supervisor.stdout.readline()
            self.pid = int(line) if line.strip() else None
        atexit.register(self.stop)

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        logged_s = 0.0
        while not self.healthy(timeout_s=2.0):
            waited = time.monotonic() - started
            if not self.alive():
                raise EngineError(f"the vLLM server ended while it started; {self.end_of_log()}")
            if waited > self.config.start_timeout_s:
                raise EngineError(
                    f"the vLLM server did not answer within {self.config.start_timeout_s:g} s "
                    f"(vllm.start_timeout_s); {self.end_of_log()}"
                )
            if self.on_wait:
                self.on_wait(waited, self.log_tail(1))
            if waited - logged_s >= 10:
                logged_s = waited
                logger.info("waiting for vLLM, %d s: %s", waited, self.log_tail(1))
            time.sleep(_POLL_S)


_MADE: WeakSet[VLLMServer] = WeakSet()


def _forget_all() -> None:
    for server in tuple(_MADE):
        server.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
