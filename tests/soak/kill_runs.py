"""SIGKILL to runs of a toy program, in forked processes, at named places and at any time.

A child process compiles a two-predictor program with the scripted engine, under a tiny policy that
is really trained. It kills itself at a place that it passes (in a rollout, as one ends, in a step, a publish, a
checkpoint, a reflection), or is killed at any time. Another child resumes; one in four is killed too. State,
population, metrics and result must then be those of the run that nobody killed, and no more rollouts may have been run
than it ran and were in flight.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dspy

from fst_optimizer import FST, Policy
from fst_optimizer.failpoints import inject
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.testing import ScriptedEngine, make_tiny_model
from helpers.toy import RULE, answer, examples, metric, student_of

IN_FLIGHT = 4
CONFIG = {
    "fast": {"population": 2, "anchor_size": 4, "max_rollouts": 32, "max_proposals": 3, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": IN_FLIGHT},
    "train": {"steps_per_cycle": 2, "lr": 0.01, "warmup_steps": 0},
    "eval": {"kl_examples": 2},
    "budget": {"max_cycles": 3},
}
SPREAD = (
    *("reflection.answer", "rollout.end", "trainer.step", "policy.publish", "files.commit", "any time"),
    *("engine.answer", "metric.answer", "files.write", "any time"),
)
"""Where the kills come, in turn."""
PLACES = tuple(place for place in SPREAD if place != "any time")


class Reflection(dspy.LM):
    """Answers with the rule, and the length of what it was shown, so that no two answers are the same by accident."""

    def __init__(self) -> None:
        super().__init__("openai/reflection", api_key="none")

    def __call__(self, prompt: Any = None, **_: Any) -> list[str]:
        return [f"```\nAnswer. {RULE} ({len(str(prompt))})\n```"]


def compile_once(model: Path, run_dir: Path, *, resume: bool) -> None:
    """One run; every rollout that ends is noted beside the run, whoever counts it."""
    policy = Policy(model, engine=lambda policy: ScriptedEngine(policy, answer), max_tokens=128)
    program = student_of(policy)
    noted = os.open(run_dir.with_suffix(".ended"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(rollout: Any) -> Any:
        os.write(noted, b".")
        return rollout

    fst = FST(metric, config=CONFIG, reflection_lm=Reflection(), run_dir=run_dir, resume=resume, progress=False)
    with inject("rollout.end", note):
        fst.compile(program, trainset=examples(8), valset=examples(4, 100))


def in_child(work: Callable[[], None], *, kill_after_s: float | None = None) -> int:
    """Run it in a forked process, killed after a time if it still runs; the process's exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Reference:
    """The run that nobody killed."""

    run_dir: Path
    seconds: float
    passages: dict[str, int]


def reference_run(model: Path, folder: Path) -> Reference:
    run_dir, counted = folder / "whole", folder / "passages.json"

    def work() -> None:
        passages = dict.fromkeys(PLACES, 0)
        with ExitStack() as stack:
            for place in PLACES:

                def count(value: Any, place: str = place) -> Any:
                    passages[place] += 1
                    return value

                stack.enter_context(inject(place, count))
            compile_once(model, run_dir, resume=False)
        counted.write_text(json.dumps(passages))

    started = time.monotonic()
    assert in_child(work) == 0
    return Reference(run_dir, time.monotonic() - started, json.loads(counted.read_text()))


def killed_and_resumed(
    model: Path, run_dir: Path, reference: Reference, where: str, draw: random.Random
) -> tuple[int, str]:
    """One kill and a resume, or more: the kills, and what is wrong then; "" if nothing is."""
    if where == "any time":
        status = in_child(
            lambda: compile_once(model, run_dir, resume=False),
            kill_after_s=draw.uniform(0.0, reference.seconds),
        )
    else:

        def work() -> None:
            with inject(where, die, after=draw.randrange(reference.passages[where])):
                compile_once(model, run_dir, resume=False)

        status = in_child(work)
    if status not in (-signal.SIGKILL, 0):
        return 0, f"the first process ended with {status}"
    kills = int(status != 0)
    while not (run_dir / "result.json").exists():
        again = draw.uniform(0.0, reference.seconds) if draw.random() < 0.25 else None
        resume = (run_dir / "state.json").exists()
        status = in_child(partial(compile_once, model, run_dir, resume=resume), kill_after_s=again)
        if status not in (-signal.SIGKILL, 0):
            return kills, f"the resumed process ended with {status}"
        kills += status != 0
    fault = difference(reference.run_dir, run_dir)
    ended = [folder.with_suffix(".ended").stat().st_size for folder in (reference.run_dir, run_dir)]
    return kills, fault or too_many(ended[1], ended[0], kills * IN_FLIGHT)


def difference(whole: Path, run: Path) -> str:
    """How a run differs from the one that nobody killed; "" if it does not."""
    for name in ("state.json", "result.json"):
        one, other = (untimed(read_json(folder / name)) for folder in (whole, run))
        if one != other:
            return f"{name} differs"
    if untimed(read_metrics(whole / "metrics.jsonl")) != untimed(read_metrics(run / "metrics.jsonl")):
        return "metrics.jsonl differs"
    for path in sorted((whole / "population").glob("*")):
        if path.read_bytes() != (run / "population" / path.name).read_bytes():
            return f"population/{path.name} differs"
    return ""


def too_many(run: int, needed: int, in_flight: int) -> str:
    """What is wrong with so many rollouts; "" if nothing is."""
    if 0 <= run - needed <= in_flight:
        return ""
    return f"{run} rollouts were run where {needed} were needed and {in_flight} may have been in flight"


def untimed(data: Any) -> Any:
    """Without what no two runs have alike: their ids, seconds, and checksums and sizes of files that hold seconds."""
    if isinstance(data, dict):
        timed = ("time_s", "step_s", "wall_s", "elapsed_s", "metrics_size", "metrics_sha256", "sha256")
        return {name: untimed(value) for name, value in data.items() if name not in (*timed, "run_id", "config.json")}
    return [untimed(value) for value in data] if isinstance(data, list) else data


class Runs:
    """Runs of the toy program."""

    spread = SPREAD

    def begin(self, folder: Path) -> dict[str, Any]:
        """The run that nobody kills; what there is to say of it."""
        import torch

        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        self.folder = folder
        self.model = make_tiny_model(folder / "model")
        self.reference = reference_run(self.model, folder)
        return {"seconds": round(self.reference.seconds, 1), "passages": self.reference.passages}

    def kill(self, number: int, where: str, draw: random.Random) -> tuple[int, str]:
        """Kill and resume one: how many kills it got, and what is wrong with how it ended."""
        return killed_and_resumed(self.model, self.folder / f"run-{number}", self.reference, where, draw)
