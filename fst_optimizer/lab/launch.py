"""Runs of a comparison, each in a process of its own, so that it can be stopped and continued."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fst_optimizer.errors import FSTError
from fst_optimizer.lab.plan import Job
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.text import clock

Tell = Callable[[str], None]
POLL_S = 0.2
TAIL_LINES = 12


class RunFailed(FSTError):
    """A run of a comparison ended without a result; the others stand."""


@dataclass
class _Running:
    job: Job
    number: int
    process: subprocess.Popen[bytes]
    started: float


def run_all(jobs: Sequence[Job], *, at_once: int, tell: Tell) -> None:
    """Make every run that is not finished, `at_once` at a time; interrupted ones go on from their last cycle.

    Raises:
        RunFailed: one ended without a result; those beside it are stopped, and go on next time.
    """
    todo = [(number, job) for number, job in enumerate(jobs, 1) if not RunFiles(job.folder).result.exists()]
    if len(todo) < len(jobs):
        tell(f"{len(jobs) - len(todo)} of {len(jobs)} runs were finished before")
    with _stopped_at_the_end() as running:
        while todo or running:
            while todo and len(running) < at_once:
                number, job = todo.pop(0)
                tell(f"[{number}/{len(jobs)}] {job.label} started")
                running.append(_Running(job, number, _start(job, alone=at_once == 1), time.monotonic()))
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                tell(f"[{one.number}/{len(jobs)}] {_outcome(one)}")
            if not ended:
                _wait(running)


def log_path(job: Job) -> Path:
    """Where a run's words went."""
    return job.folder.with_name(f"{job.folder.name}.log")


@contextmanager
def _stopped_at_the_end() -> Iterator[list[_Running]]:
    """A list of runs in flight, of which none outlives the context: two writers in one folder would spoil it."""
    running: list[_Running] = []
    try:
        yield running
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _start(job: Job, *, alone: bool) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if not alone:
        # Several torch processes with all cores each are slower than one after the other.
        environment["OMP_NUM_THREADS"] = "1"
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_path(job).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *job.command()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )


def _wait(running: Sequence[_Running]) -> None:
    try:
        running[0].process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return


def _outcome(one: _Running) -> str:
    files = RunFiles(one.job.folder)
    if one.process.returncode or not files.result.exists():
        tail = log_path(one.job).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        raise RunFailed(
            f"{one.job.label} ended with exit code {one.process.returncode}; the end of {log_path(one.job)}:\n"
            + "\n".join(tail)
        )
    result = read_json(files.result)
    return (
        f"{one.job.label} done in {clock(time.monotonic() - one.started)}: "
        f"validation {result['val_score_before']:.3f} -> {result['val_score_after']:.3f}"
    )
