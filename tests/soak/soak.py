"""Many short runs in one process: memory, threads and open files must level off.

`make soak` runs it. After each compile on the letters task it prints one line, and it ends with an error when, from
the second half of the runs on, threads or open files still grow, or memory grows by more than `--allowed-mb`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from fst_optimizer import FST, Policy
from fst_optimizer.tasks import load_task

CONFIG = {
    "budget": {"max_cycles": 2},
    "fast": {"population": 2, "anchor_size": 4, "max_rollouts": 32, "max_proposals": 2, "minibatch": 2},
    "rollout": {"group_size": 2, "batch_size": 4},
    "train": {"steps_per_cycle": 2, "warmup_steps": 0},
    "eval": {"kl_examples": 4},
}


@dataclass(frozen=True)
class Usage:
    """What this process holds."""

    memory_mb: float
    threads: int
    open_files: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        process = psutil.Process(os.getpid())
        return cls(process.memory_info().rss / 2**20, threading.active_count(), process.num_fds())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="compiles; each is two small cycles")
    parser.add_argument("--allowed-mb", type=float, default=64.0, help="growth of memory allowed over the second half")
    arguments = parser.parse_args()
    task = load_task("programs/letters")
    policy = Policy(str(task.model()), max_tokens=64)
    seen: list[Usage] = []
    print("run  seconds  memory_mb  threads  open_files", flush=True)
    with tempfile.TemporaryDirectory(prefix="fst-soak-") as folder:
        for run in range(arguments.runs):
            started = time.monotonic()
            program = task.build_program()
            program.set_lm(policy.lm_at(0))
            fst = FST(task.metric, config={**CONFIG, "seed": run}, run_dir=Path(folder) / f"run-{run}")
            fst.compile(program, trainset=task.load("train", 16), valset=task.load("val", 8))
            seen.append(Usage.now())
            line = (time.monotonic() - started, seen[-1].memory_mb, seen[-1].threads, seen[-1].open_files)
            print(f"{run:3d}  {line[0]:7.1f}  {line[1]:9.0f}  {line[2]:7d}  {line[3]:10d}", flush=True)
    faults = growth(seen[len(seen) // 2 :], arguments.allowed_mb)
    print("\n".join(faults) or "nothing grew over the second half of the runs")
    return 1 if faults else 0


def growth(seen: list[Usage], allowed_mb: float) -> list[str]:
    """What the last of these holds more of than the first."""
    first, last = seen[0], seen[-1]
    faults = []
    if last.memory_mb - first.memory_mb > allowed_mb:
        faults.append(f"memory grew from {first.memory_mb:.0f} to {last.memory_mb:.0f} MB")
    if last.threads > first.threads:
        faults.append(f"threads grew from {first.threads} to {last.threads}")
    if last.open_files > first.open_files:
        faults.append(f"open files grew from {first.open_files} to {last.open_files}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
