"""Runs of a comparison, each in a process of its own, so that it can be stopped and continued."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fst_optimizer.children import GRACE_S, start_child
from fst_optimizer.errors import FSTError
from fst_optimizer.lab.plan import Job
from fst_optimizer.store.files import RunFiles, in_use, read_json
from fst_optimizer.text import clock

Tell = Callable[[str], None]
POLL_S = 0.2
TAIL_LINES = 12


class RunFailed(FSTError):
    """Runs of a comparison ended without a result; the others were made all the same."""


@dataclass(frozen=True)
class _Running:
    job: Job
    name: str
    """`[3/12] letters/fst-seed0`."""
    process: subprocess.Popen[bytes]
    started_s: float


def run_all(jobs: Sequence[Job], *, at_once: int, tell: Tell) -> None:
    """Make every run that is not finished, `at_once` at a time; interrupted ones go on from their last checkpoint.

    A run that ends without a result is told of with the end of its log, and does not stop the others.

    Raises:
        RunFailed: when all have ended and some have no result; it names them.
    """
    todo = [(number, job) for number, job in enumerate(jobs, 1) if not RunFiles(job.folder).result.exists()]
    if len(todo) < len(jobs):
        tell(f"{len(jobs) - len(todo)} of {len(jobs)} runs were finished before")
    running: list[_Running] = []
    failed: list[Job] = []
    try:
        while todo or running:
            while todo and len(running) < at_once:
                number, job = todo.pop(0)
                name = f"[{number}/{len(jobs)}] {job.label}"
                _wait_for_earlier(job, partial(tell, f"{name} waits for the run of an earlier command to end"))
                if RunFiles(job.folder).result.exists():
                    tell(f"{name} was finished by it")
                    continue
                tell(f"{name} started")
                running.append(_Running(job, name, _start(job, alone=at_once == 1), time.monotonic()))
            with suppress(subprocess.TimeoutExpired):
                running[0].process.wait(POLL_S)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                done = one.process.returncode == 0 and RunFiles(one.job.folder).result.exists()
                tell(f"{one.name} {_result(one) if done else _failure(one)}")
                failed += [] if done else [one.job]
    finally:  # none outlives this call, nor this process: two writers in one folder would spoil it
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    if failed:
        names = "; ".join(f"{job.label}, see {log_path(job)}" for job in failed)
        raise RunFailed(f"{len(failed)} of {len(jobs)} runs ended without a result: {names}")


def log_path(job: Job) -> Path:
    """Where the output of a run's process goes."""
    return job.folder.with_name(f"{job.folder.name}.log")


def _wait_for_earlier(job: Job, tell: Callable[[], None]) -> None:
    """A command that was killed leaves its runs some seconds behind, in which they end in order."""
    deadline = time.monotonic() + GRACE_S
    if in_use(job.folder):
        tell()
    while in_use(job.folder) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _start(job: Job, *, alone: bool) -> subprocess.Popen[bytes]:
    # Several torch processes with all cores each are slower than one after the other.
    threads = {} if alone else {"OMP_NUM_THREADS": "1"}
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_path(job).open("ab") as log:
        return start_child(
            [sys.executable, "-m", *job.command()],
            {**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _failure(one: _Running) -> str:
    log = log_path(one.job)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return f"failed with exit code {one.process.returncode}; the end of {log}:\n{tail}"


def _result(one: _Running) -> str:
    result = read_json(RunFiles(one.job.folder).result)
    return (
        f"done in {clock(time.monotonic() - one.started_s)}: "
        f"validation {result['val_score_before']:.3f} -> {result['val_score_after']:.3f}"
    )
