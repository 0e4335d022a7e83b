"""`fst serve`: what a finished run learned, as an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fst_optimizer.config.overrides import assignments, settled
from fst_optimizer.config.policy import VLLMConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.engines.vllm.server import BASE_NAME, SERVED_NAME, OnWait, VLLMServer
from fst_optimizer.errors import UserError
from fst_optimizer.finished.adapter import ADAPTER, write_adapter
from fst_optimizer.finished.load import kept_server_settings, read_finished
from fst_optimizer.finished.recorded import base_of, check_given_base
from fst_optimizer.model.load import model_place
from fst_optimizer.store.files import RunFiles
from fst_optimizer.store.folders import TemporaryFolder


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
        model: Where the base model is now. None: as the run names it, where that is no folder but a name.
        name: The model name that clients ask for.
        host: What to listen on.
        port: None: a free one.
        api_key: None: a new random one.
        config: Memory, devices and more. None: the run's own lengths and shares of memory; flags and paths are never
            taken from a run's files.
        trust_remote_code: Whether code in the model's folder may run.
        on_wait: Told while the server starts.

    Raises:
        UserError: the run is not finished, the base model is missing, or vLLM is.
    """
    run = read_finished(run_dir)
    made = run.policy
    source = model_place(base_of(made, model))
    if api_key is not None and not api_key.strip():
        raise UserError("api_key is empty: give one, or None for a new random one")
    check_given_base(made, model, source, trust_remote_code)
    config = config or server_settings(run.files.root, ())
    if made.chat_template_args:
        # Prompts are made by the server: its template must get what the run's got.
        switches = json.dumps(dict(made.chat_template_args))
        config = config.changed(flags=(*config.flags, "--default-chat-template-kwargs", switches))
    served = TemporaryFolder("fst-served-") if run.adapter else None
    rank = write_adapter(run.adapter, served.path / ADAPTER, source) if run.adapter and served else None
    return VLLMServer(
        source,
        max_lora_rank=rank,
        config=config,
        dtype=made.dtype,
        served_name=BASE_NAME if served else name,
        adapters={name: served.path / ADAPTER} if served else {},
        runtime_adapters=False,
        trust_remote_code=trust_remote_code,
        api_key=api_key or "",
        host=host,
        port=port or 0,
        on_wait=on_wait,
        needs=served,
    )


def server_settings(run_dir: Path, sets: Iterable[str]) -> VLLMConfig:
    """`vllm.NAME=VALUE` strings, over the lengths and the share of memory of the run's own vLLM.

    Raises:
        UserError: a setting that is not there, or not the server's.
    """
    given = assignments(sets)
    other = [name for name in given if not name.startswith("vllm.")]
    if other:
        raise UserError(f"--set is {other[0]}=...: only settings of the server can be given here (vllm.NAME=VALUE)")
    return settled(FSTConfig(), kept_server_settings(RunFiles(run_dir), given), given).vllm
