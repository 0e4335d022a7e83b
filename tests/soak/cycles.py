"""One long run of small cycles on the letters task: memory, open files and threads must stay flat.

`make soak` runs it. The first cycles warm up: caches fill, and PyTorch keeps what it once took. From then on memory may
grow by no more than `--allowed-mb`, and threads and open files not at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fst_optimizer import FST, Policy
from fst_optimizer.tasks import load_task
from soak import CONFIG, Usage, growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=20, help="cycles before the first that is held against the last")
    parser.add_argument("--allowed-mb", type=float, default=32.0, help="growth of memory allowed after the warm-up")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    task = load_task("programs/letters")
    policy = Policy(str(task.model()), max_tokens=64)
    program = task.build_program()
    program.set_lm(policy.lm)
    seen: list[Usage] = []
    started = time.monotonic()
    print("cycle  seconds  memory_mb  threads  open_files", flush=True)

    def watch(event: Any) -> None:
        if event["kind"] != "fast":
            return
        seen.append(Usage.now())
        if len(seen) % 20 == 1:
            last = seen[-1]
            shown = (len(seen) - 1, time.monotonic() - started, last.memory_mb, last.threads, last.open_files)
            print("{:5d}  {:7.0f}  {:9.0f}  {:7d}  {:10d}".format(*shown), flush=True)

    config = {**CONFIG, "budget": {"max_cycles": arguments.cycles}, "monitors": {"flat": "off", "kl": "off"}}
    with tempfile.TemporaryDirectory(prefix="fst-cycles-") as folder:
        fst = FST(task.metric, config=config, run_dir=Path(folder) / "run", callbacks=[watch])
        fst.compile(program, trainset=task.load("train", 16), valset=task.load("val", 8))
        kept = sum(1 for path in (Path(folder) / "run").rglob("*") if path.is_file())
    policy.close()
    faults = growth(seen[arguments.warm_up :], arguments.allowed_mb)
    print("\n".join(faults) or f"nothing grew after {arguments.warm_up} cycles; the run left {kept} files")
    if arguments.out:
        figures = {name: asdict(seen[place]) for name, place in (("warm", arguments.warm_up), ("end", -1))}
        arguments.out.write_text(json.dumps({"cycles": len(seen), "files_left": kept, **figures}, indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
