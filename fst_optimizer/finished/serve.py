"""`fst serve`: what a finished run learned, as an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fst_optimizer.config.overrides import assignments, read_settings, settled
from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.engines.vllm.server import BASE_NAME, SERVED_NAME, OnWait, VLLMServer
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import read_finished
from fst_optimizer.model.load import model_place
from fst_optimizer.store.files import ADAPTER_CONFIG, RunFiles, read_json


def policy_server(
    run_dir: str | Path,
    *,
    model: str | None = None,
    name: str = SERVED_NAME,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    config: VLLMConfig | None = None,
    trust_remote_code: bool = False,
    on_wait: OnWait | None = None,
) -> VLLMServer:
    """A vLLM server of a finished run's best policy version, not started yet.

        with policy_server("runs/first") as server:
            print(server.url, server.api_key)

    Adapters cannot be loaded into it while it runs, and every path but its health needs the key.

    Args:
        run_dir: What `FST(run_dir=...)` or `fst compile --run-dir` left.
        model: Where the base model is now. None: where it was.
        name: The model name that clients ask for.
        host: What to listen on.
        port: None: a free one.
        api_key: None: a new random one.
        config: Memory, devices and more. None: what the run used.
        trust_remote_code: Whether code in the model's folder may run.
        on_wait: Told while the server starts.

    Raises:
        UserError: the run is not finished, the base model is missing, or vLLM is.
    """
    run = read_finished(run_dir)
    source = model_place(model or run.policy["model"])
    if api_key is not None and not api_key.strip():
        raise UserError("api_key is empty: give one, or None for a new random one")
    config = config or server_settings(run.files.root, ())
    if template := run.policy["chat_template_args"]:
        # Prompts are made by the server: its template must get what the run's got.
        config = config.changed(flags=(*config.flags, "--default-chat-template-kwargs", json.dumps(dict(template))))
    adapter = run.adapter
    return VLLMServer(
        source,
        max_lora_rank=read_json(adapter / ADAPTER_CONFIG)["r"] if adapter else None,
        config=config,
        dtype=run.policy.get("dtype", "auto"),
        served_name=BASE_NAME if adapter else name,
        adapters={name: adapter.resolve()} if adapter else {},
        runtime_adapters=False,
        trust_remote_code=trust_remote_code,
        api_key=api_key or "",
        host=host,
        port=port or 0,
        on_wait=on_wait,
    )


def server_settings(run_dir: Path, sets: Iterable[str]) -> VLLMConfig:
    """How the run's vLLM was run, with `vllm.NAME=VALUE` strings over it.

    Raises:
        UserError: a setting that is not there, or not the server's.
    """
    given = assignments(sets)
    other = [name for name in given if not name.startswith("vllm.")]
    if other:
        raise UserError(f"--set is {other[0]}=...: only settings of the server can be given here (vllm.NAME=VALUE)")
    recorded = {
        name: value
        for name, value in read_settings(RunFiles(run_dir).config).items()
        if name.startswith("vllm.") and name != "vllm.log_file"
    }
    return settled(FSTConfig(), recorded, given).vllm
