"""One run over several tasks, in a process of its own: `python -m fst_optimizer.lab.stream_run TASK... --run-dir DIR`.

A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fst_optimizer.children import end_with_parent
from fst_optimizer.store.files import RunFiles
from fst_optimizer.task_run import RunRequest, Sizes, compile_task, plan_run
from fst_optimizer.tasks import load_task


def main() -> None:
    """Make the run, or go on with it."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    for name in ("method", "engine", "model", "reflection-lm"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--config", type=Path)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-size", type=int)
    read = parser.parse_args()
    request = RunRequest(
        read.tasks[0],
        read.run_dir,
        read.model,
        engine=read.engine,
        reflection_lm=read.reflection_lm,
        config_file=read.config,
        flags={"method": read.method},
        sets=tuple(read.set),
        sizes=Sizes(read.train_size, read.val_size, read.test_size),
        resume=RunFiles(read.run_dir).config.exists(),
    )
    compile_task(request, plan_run(request), stages=[load_task(name) for name in read.tasks])


if __name__ == "__main__":
    main()
