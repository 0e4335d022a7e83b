"""Many policy versions published to one vLLM server: its memory must level off, and live versions keep their files.

`make soak` runs it with 50 versions; the test suite with a tenth. It ends with an error when the server's processes
hold more than a tenth more memory after the last version than after the first few, when files of a live version are
gone, or when one does not answer with its own log-probs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fst_optimizer import Policy
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import as_row, move_adapter
from helpers.servers import memory_mib

WARM = 4
"""Versions after which memory is measured first: caches have filled then."""
REQUESTS = 64
ALLOWED = 0.10
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Published:
    """What was seen after one version."""

    version: int
    memory_mib: float
    far: float
    """Largest difference from the trainer's log-probs, in nats."""
    files_there: bool
    """Whether every live version has its files."""


def publish(policy: Policy, pid: int, seed: int) -> Published:
    """Publish a version that differs, let go of the one before the last, and ask the new one."""
    move_adapter(policy, seed=seed)
    version = policy.publish()
    policy.retire_all_but({version, version - 1})
    prompts = [policy.encode_chat([{"role": "user", "content": f"Sort the letters: d c b a {n}"}]) for n in range(8)]
    asked = [GenerationRequest(prompts[n % 8], 24, seed=seed + n, version=version) for n in range(REQUESTS)]
    answers = [future.result(timeout=120) for future in [policy.engine.submit(request) for request in asked]]
    calls = [as_row(*pair).call for pair in zip(asked, answers, strict=True)]
    trained = policy.logprobs_of(calls, policy.tensors(version))
    pairs = zip(calls, trained, strict=True)
    far = max(abs(a - b) for call, row in pairs for a, b in zip(call.logprobs, row, strict=True))
    folders = [policy.engine.adapter(live) for live in policy.engine.versions()]
    there = all((folder / "adapter_model.safetensors").is_file() for folder in folders)
    return Published(version, memory_mib(pid), far, there)


def faults(seen: list[Published]) -> list[str]:
    """What must not be."""
    first, last = seen[min(WARM, len(seen) - 1) - 1], seen[-1]
    found = [f"version {one.version}: files of a live version are gone" for one in seen if not one.files_there]
    found += [f"version {one.version}: {one.far:.2g} nats from the trainer" for one in seen if one.far > TOLERANCE]
    if last.memory_mib > (1 + ALLOWED) * first.memory_mib:
        found.append(f"the server's memory grew from {first.memory_mib:.0f} to {last.memory_mib:.0f} MiB")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=50)
    arguments = parser.parse_args()
    policy = Policy(str(load_task("programs/letters").model()), engine="vllm")
    seen: list[Published] = []
    print("version  server_mib  nats_from_trainer", flush=True)
    try:
        for seed in range(arguments.versions):
            seen.append(publish(policy, policy.engine.server.pid, seed))
            print(f"{seen[-1].version:7d}  {seen[-1].memory_mib:10.0f}  {seen[-1].far:17.2g}", flush=True)
    finally:
        policy.close()
    found = faults(seen)
    print("\n".join(found) or f"memory grew by less than {ALLOWED:.0%} after version {WARM}, and no file is missing")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
