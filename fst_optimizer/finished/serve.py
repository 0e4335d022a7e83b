"""`fst serve`: what a finished run learned, as an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fst_optimizer.config.overrides import assignments, read_settings, settled
from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.engines.vllm.server import BASE_NAME, SERVED_NAME, OnWait, VLLMServer
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import finished
from fst_optimizer.model.load import check_model_folder
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
    files = RunFiles(Path(run_dir))
    result, recorded = finished(files.root)
    made, version = recorded["policy"], result["policy_version"]
    source = model or made["model"]
    check_model_folder(source)
    config = config or server_settings(files.root, ())
    if made["chat_template_args"]:
        config = config.changed(flags=(*config.flags, *_template_flags(made["chat_template_args"])))
    folder = files.adapter(version).resolve()
    return VLLMServer(
        source,
        max_lora_rank=read_json(folder / ADAPTER_CONFIG)["r"] if version else None,
        config=config,
        dtype=made.get("dtype", "auto"),
        served_name=BASE_NAME if version else name,
        adapters={name: folder} if version else None,
        runtime_adapters=False,
        trust_remote_code=trust_remote_code,
        api_key=_checked_key(api_key),
        host=host,
        port=port,
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


def _template_flags(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Prompts are made by the server here: its template must get what the run's got."""
    return "--default-chat-template-kwargs", json.dumps(dict(arguments))


def _checked_key(api_key: str | None) -> str | None:
    if api_key is not None and not api_key.strip():
        raise UserError("api_key is empty: give one, or None for a new random one")
    return api_key
