"""SIGKILL to the real commands, to their workers, runs and servers; the same command is typed again until it ends.

Each command runs in a process of its own and in a folder of its own, also for temporary files. What it starts inherits
a mark in its environment, by which whatever outlives it is found.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from kill_runs import difference, too_many, untimed

from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.testing import make_tiny_model
from fst_optimizer.tuning.admission import SURPLUS, cause_of
from helpers.run_check import assert_as_designed
from helpers.tune import make_task, trials_of

MARK = "FST_KILLS_MARK"
LIMIT_S = 1800.0
"""Most that one command may take."""
LEFT_S = 40.0
"""Within this time all that a command started is gone."""
STARTS = 8
LOOK_S = 0.02
COMMAND = "the command"
NOTING = """

from fst_optimizer.failpoints import inject


def note(rollout):
    with open(os.environ["FST_KILLS_ENDED"], "ab", buffering=0) as file:
        file.write(b".")
    return rollout


noting = inject("rollout.end", note)
noting.__enter__()
"""
"""Every rollout that ends is noted, whoever counts it."""


@dataclass
class Started:
    """A command that is typed until it ends."""

    arguments: Callable[[], Sequence[object]]
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: set[psutil.Process] = field(default_factory=set)
    process: psutil.Popen | None = None

    def start(self) -> None:
        temporary = self.log.with_suffix(".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        environment["FST_KILLS_ENDED"] = str(self.log.with_name("ended"))
        command = [sys.executable, "-m", "fst_optimizer.cli.main", *map(str, self.arguments())]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.seen.add(self.process)

    def children(self) -> list[psutil.Process]:
        """All processes below it, now."""
        try:
            found = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen |= set(found)
        return sorted(found, key=lambda process: process.pid)

    def kill(self, find: Callable[[Started], list[psutil.Process]], after_s: float, draw: random.Random) -> bool:
        """Kill one of those that are found, as soon as there is one; False if the command ended before."""
        with suppress(psutil.TimeoutExpired):
            self.process.wait(after_s)
        while self.process.poll() is None:
            self.children()
            if found := find(self):
                draw.choice(found).kill()
                return True
            time.sleep(LOOK_S)
        return False

    def left(self) -> str:
        """What of it still runs after a while; killed then, and told."""
        deadline = time.monotonic() + LEFT_S
        while (alive := [process for process in {*self.seen, *marked(self.mark)} if runs(process)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.2)
        told = [f"{process.pid} {' '.join(process.cmdline())[:120]}" for process in alive]
        for process in alive:
            process.kill()
        return f"processes were left: {told}" if told else ""

    def tail(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-4:])


def marked(mark: str) -> list[psutil.Process]:
    """Every process with this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def named(*words: str) -> Callable[[Started], list[psutil.Process]]:
    """Finds processes below the command whose command line, or name, has one of these words."""

    def find(started: Started) -> list[psutil.Process]:
        return [process for process in started.children() if any(word in line_of(process) for word in words)]

    return find


def line_of(process: psutil.Process) -> str:
    try:
        return f"{' '.join(process.cmdline())} {process.name()}"
    except psutil.Error:
        return ""


class Commands:
    """What is common to all: a command is killed, typed again, sometimes killed again, and looked at when it ended."""

    spread: tuple[str, ...]
    ends: tuple[int, ...] = (0,)
    """Exit codes of a command of which something else than itself was killed."""

    folder: Path
    seconds: float

    def arguments(self, folder: Path) -> Sequence[object]:
        raise NotImplementedError

    def finders(self, folder: Path) -> dict[str, Callable[[Started], list[psutil.Process]]]:
        """Who is killed, by what `spread` says."""
        raise NotImplementedError

    def fault(self, folder: Path, where: Sequence[str]) -> str:
        """What is wrong when all of these were killed; "" if nothing is."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What all of the commands need."""

    def has_ended(self, folder: Path) -> bool:
        """Whether nothing is left to do: who was killed had done its work and was about to leave."""
        return False

    def ready_s(self, folder: Path, started: Started) -> float:
        """Seconds until it may be killed."""
        return 0.0

    def begin(self, folder: Path) -> dict[str, Any]:
        self.folder = folder
        whole = folder / "whole"
        whole.mkdir()
        self.prepare()
        started = Started(lambda: self.arguments(whole), whole / "command.log")
        started.start()
        waited = self.ready_s(whole, started)
        before = time.monotonic()
        code = started.process.wait(LIMIT_S)
        self.seconds = time.monotonic() - before
        fault = f"it ended with {code}: {started.tail()}" if code else started.left() or self._checked(whole, ())
        if fault:
            raise SystemExit(f"the command that nobody killed: {fault}")
        return {"seconds": round(self.seconds, 1), "before_s": round(waited, 1)}

    def kill(self, number: int, where: str, draw: random.Random) -> tuple[int, str]:
        span = self.seconds
        for retry in range(STARTS):
            folder, began = self.folder / f"{number}-{retry}", time.monotonic()
            folder.mkdir()
            killed, fault = self._until_it_ends(folder, where, span, draw)
            if killed or fault:
                return len(killed), fault
            span = min(0.7 * span, time.monotonic() - began)  # it ended before: the machine was slower at first
        return 0, f"it always ended before {where} could be killed"

    def _checked(self, folder: Path, where: Sequence[str]) -> str:
        try:
            return self.fault(folder, where)
        except AssertionError as error:
            return f"a run is not as designed: {error}"

    def _until_it_ends(self, folder: Path, where: str, span: float, draw: random.Random) -> tuple[list[str], str]:
        started = Started(lambda: self.arguments(folder), folder / "command.log")
        killed: list[str] = []
        for start in range(STARTS):
            victim = where if start == 0 else draw.choice(self.spread) if draw.random() < 0.25 else ""
            after_s = draw.uniform(0.0, span)
            started.start()
            if start == 0:
                self.ready_s(folder, started)
            hit = bool(victim) and started.kill(self.finders(folder)[victim], after_s, draw)
            killed += [victim] if hit else []
            try:
                code = started.process.wait(LIMIT_S)
            except psutil.TimeoutExpired:
                return killed, f"hangs after kills of {killed}: {started.tail()} {started.left()}"
            allowed = (0,) if not hit else (0, -9) if victim == COMMAND else self.ends
            if code not in allowed:
                return killed, f"ended with {code} after kills of {killed}: {started.tail()} {started.left()}"
            if code == 0 or self.has_ended(folder):
                return killed, started.left() or self._checked(folder, killed)
        return killed, f"did not end in {STARTS} starts"


class OfTiny(Commands):
    """Commands on the tiny task, which notes every rollout that ends."""

    def prepare(self) -> None:
        self.task = make_task(self.folder / "tiny", make_tiny_model(self.folder / "model"))
        with (self.task / "task.py").open("a") as file:
            file.write(NOTING)


def ended(folder: Path) -> int:
    return (folder / "ended").stat().st_size


class Tune(OfTiny):
    """`fst tune` on the tiny task: two workers, SQLite."""

    spread = (COMMAND, "a worker", "a worker in a trial")
    trials = 4
    in_flight = 2
    """Trials at a time."""

    def arguments(self, folder: Path) -> Sequence[object]:
        study = ("--dir", folder / "study", "--space", self.task / "space.json")
        return ("tune", self.task, *study, "--trials", self.trials, "--workers", 2, "--heartbeat-s", 5)

    def finders(self, folder: Path) -> dict[str, Callable[[Started], list[psutil.Process]]]:
        worker = named("fst_optimizer.tuning")

        def in_a_trial(started: Started) -> list[psutil.Process]:
            return [process for process in worker(started) if writes_below(process, folder / "study" / "trials")]

        return {COMMAND: itself, "a worker": worker, "a worker in a trial": in_a_trial}

    def fault(self, folder: Path, where: Sequence[str]) -> str:
        study = folder / "study"
        trials = trials_of(f"sqlite:///{study / 'study.db'}", "tiny-0")
        done = [trial.number for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
        failed = [trial for trial in trials if trial.state.name == "FAIL"]
        if len(done) != self.trials or len(done) + len(failed) != len(trials):
            return f"trials are {Counter(trial.state.name for trial in trials)}"
        again = Counter(history[-1] for trial in trials if (history := trial.system_attrs.get("retry_history")))
        odd = [
            trial.number for trial in failed if again[trial.number] > 1 or (trial.params and not again[trial.number])
        ]
        if odd or set(again) - {trial.number for trial in failed}:
            return f"trials {odd} were lost or run twice; tried again were {dict(again)}"
        flying = sum(self.in_flight if who == COMMAND else 1 for who in where)
        # Two workers may ask for the last place at once: whose trial comes second gives it up unspent.
        lost = [(trial.number, cause_of(trial)) for trial in failed if cause_of(trial) != SURPLUS]
        if len(lost) > flying:
            return f"{len(lost)} trials failed where {flying} may have been in flight: {lost}"
        rows = read_json(study / "tune.json")["trials"]
        if sorted(row["trial"] for row in rows if row["state"] in ("complete", "pruned")) != sorted(done):
            return "tune.json has other trials than the study"
        if not (study / "best.json").exists():
            return "best.json is missing"
        runs = [study / "trials" / f"trial-{number:06d}" for number in done]
        for run in runs:
            assert_as_designed(run)
        spent = [sum(read_json(run / "result.json")["rollouts"][kind] for kind in KINDS) for run in runs]
        return too_many(ended(folder), sum(spent), len(failed) * max(spent))


KINDS = ("fast", "slow", "eval")
"""Rollouts that are run, not read from a journal."""


class Compare(OfTiny):
    """`fst lab compare` on the tiny task: two methods, two seeds, two runs at a time, real training."""

    spread = (COMMAND, "a run")
    ends = (0, 1)
    in_flight = 4 + 4
    """Rollouts at a time: four threads in each of two runs."""

    def arguments(self, folder: Path) -> Sequence[object]:
        methods = ("--methods", "fst,rl", "--seeds", "0,1", "--max-rollouts", 24, "--jobs", 2)
        return ("lab", "compare", self.task, "--out", folder / "out", *methods, "--set", "fast.max_rollouts=8")

    def finders(self, folder: Path) -> dict[str, Callable[[Started], list[psutil.Process]]]:
        return {COMMAND: itself, "a run": named("--run-dir")}

    def fault(self, folder: Path, where: Sequence[str]) -> str:
        whole, out = self.folder / "whole" / "out" / "tiny", folder / "out" / "tiny"
        for run in sorted(path for path in whole.iterdir() if path.is_dir()):
            assert_as_designed(out / run.name)
            if fault := difference(run, out / run.name):
                return f"{run.name}: {fault}"
        one, other = (same_elsewhere(read_json(path / "compare.json")) for path in (whole, out))
        if odd := [name for name in {**one, **other} if one.get(name) != other.get(name)]:
            return f"compare.json differs: {odd}"
        needed = sum(read_json(run)["rollouts"][kind] for run in out.glob("*/result.json") for kind in KINDS)
        beside = ended(self.folder / "whole") - needed
        return too_many(ended(folder), needed + beside, len(where) * self.in_flight)


def same_elsewhere(compared: dict[str, Any]) -> dict[str, Any]:
    """What a comparison found, without where it is and its seconds."""
    return {name: value for name, value in untimed(compared).items() if name != "command"}


class VLLMRun(Commands):
    """`fst compile --engine vllm` on letters; killed once its server has answered."""

    spread = (COMMAND, "the server", "the engine core")
    cycles, steps, batch, group = 2, 2, 2, 4

    def arguments(self, folder: Path) -> Sequence[object]:
        run = folder / "run"
        settings = {
            **{"train.steps_per_cycle": self.steps, "rollout.batch_size": self.batch, "rollout.group_size": self.group},
            **{"fast.anchor_size": 4, "fast.max_rollouts": 16, "fast.population": 2, "eval.kl_examples": 4},
            **{"policy.max_tokens": 32, "run.dry_run": "false"},
        }
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        sizes = ("--train-size", 16, "--val-size", 8, "--test-size", 8, "--max-cycles", self.cycles)
        resume = ("--resume",) if (run / "config.json").exists() else ()
        return ("compile", "programs/letters", "--engine", "vllm", "--run-dir", run, *sizes, *resume, *sets)

    def has_ended(self, folder: Path) -> bool:
        return RunFiles(folder / "run").result.exists()

    def ready_s(self, folder: Path, started: Started) -> float:
        journal, before = RunFiles(folder / "run").root / "journal", time.monotonic()
        while started.process.poll() is None and not any(path.stat().st_size for path in journal.glob("*")):
            started.children()
            time.sleep(0.1)
        return time.monotonic() - before

    def finders(self, folder: Path) -> dict[str, Callable[[Started], list[psutil.Process]]]:
        core = named("EngineCor")  # the kernel keeps 15 letters of a name

        def server(started: Started) -> list[psutil.Process]:
            supervisors = {process.pid for process in named("supervisor.py")(started)}
            return [process for process in started.children() if parent_of(process) in supervisors]

        return {COMMAND: itself, "the server": server, "the engine core": core}

    def fault(self, folder: Path, where: Sequence[str]) -> str:
        run = folder / "run"
        assert_as_designed(run)
        result, slow = read_json(run / "result.json"), self.cycles * self.steps * self.batch * self.group
        found = (result["ended"], result["cycles"], result["steps"], result["rollouts"]["slow"])
        if found != ("done", self.cycles, self.cycles * self.steps, slow):
            return f"ended, cycles, steps and slow rollouts are {found}"
        left = [path.name for path in (folder / "command.tmp").glob("fst-*")]
        return f"folders were left: {left}" if left else ""


def itself(started: Started) -> list[psutil.Process]:
    return [started.process]


def parent_of(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def writes_below(process: psutil.Process, folder: Path) -> bool:
    """Whether it has a file in the folder open."""
    try:
        return any(Path(file.path).is_relative_to(folder) for file in process.open_files())
    except psutil.Error:
        return False
