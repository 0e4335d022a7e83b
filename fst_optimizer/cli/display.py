"""What a run shows while it goes: progress bars and the latest numbers on a terminal, one line an event elsewhere.

`advance` folds the lines of `metrics.jsonl` and the progress events into a `Snapshot`, which both displays show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich import progress
from rich.text import Text

from fst_optimizer.cli.console import say
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.lab.tables import number
from fst_optimizer.text import clock, plain
from fst_optimizer.types import RolloutCounts

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fst_optimizer.store.metrics import Callback

Event = Mapping[str, Any]
PHASES = {"fast": "evolving prompts", "slow": "collecting rollouts", "eval": "validating", "test": "scoring"}


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment."""

    waiting: str = ""
    """What the run waits for before anything else, e.g. a server that starts."""
    phase: str = ""
    done: int = 0
    """Rollouts of this phase that ended."""
    total: int = 0
    cycle: int = 0
    """Cycles done."""
    step: int = 0
    reward: float | None = None
    frontier: int | None = None
    fast_cycle: int | None = None
    """The cycle of the last fast round; an evaluation in the same cycle is of its prompts."""
    val_first: float | None = None
    val_score: float | None = None
    val_best: float | None = None
    kl: float = 0.0
    rollouts: RolloutCounts = field(default_factory=RolloutCounts)

    def numbers(self) -> str:
        """The latest of each number."""
        counts = self.rollouts
        return (
            f"reward {number(self.reward)}   frontier {self.frontier or '-'}   validation {number(self.val_score)} "
            f"(first {number(self.val_first)}, best {number(self.val_best)})   KL {self.kl:.4f}\n"
            f"rollouts fast {counts.fast} slow {counts.slow} eval {counts.eval}"
        )


def advance(before: Snapshot, event: Event) -> Snapshot:
    """The snapshot after one event."""
    kind = event["kind"]
    if kind == "progress":
        return replace(before, waiting="", phase=event["phase"], done=event["done"], total=event["total"])
    if kind == "waiting":
        return replace(before, waiting=f"starting vLLM, {clock(event['seconds'])}: {plain(event['text'])[:90]}")
    rollouts = RolloutCounts(**event["rollouts"])
    after = replace(before, waiting="", phase="", cycle=event["cycle"], step=event["step"], rollouts=rollouts)
    if kind == "fast":
        return replace(after, frontier=event.get("frontier", event["population"]), fast_cycle=event["cycle"])
    if kind == "step":
        return replace(after, reward=event["reward_mean"])
    score = event["score"]
    first = score if before.val_first is None else before.val_first
    best = score if before.val_best is None else max(score, before.val_best)
    return replace(after, val_first=first, val_score=score, val_best=best, kl=event["kl_to_base"])


def share_done(snapshot: Snapshot, config: FSTConfig) -> float:
    """How much of the run is done, in [0, 1], by the limit that is nearer: rollouts or cycles."""
    steps = config.train.steps_per_cycle
    within = (snapshot.step - snapshot.cycle * steps) / steps if config.method in ("fst", "rl") else 0.0
    shares = [(snapshot.cycle + within) / config.budget.max_cycles]
    if config.budget.max_steps:
        shares.append(snapshot.step / config.budget.max_steps)
    if config.budget.max_rollouts:
        running = snapshot.done if snapshot.phase in ("fast", "slow") else 0
        shares.append((snapshot.rollouts.training + running) / config.budget.max_rollouts)
    return min(1.0, max(0.0, *shares))


def line_of(event: Event, before: Snapshot) -> str | None:
    """One line for people about a line of `metrics.jsonl`; None for progress events, which come too often."""
    kind = event["kind"]
    if kind == "progress":
        return None
    if kind == "waiting":
        return None if before.waiting else "starting vLLM, which takes half a minute or more ..."
    spent = RolloutCounts(**event["rollouts"]).training
    stamp, cycle = f"[{clock(event['time_s'])}]", f"cycle {event['cycle'] + 1}"
    if kind == "fast":
        return (
            f"{stamp} {cycle}: prompts evolved, {event['proposals']} proposed, {event['accepted']} accepted, "
            f"population {event['population']}, best {event['best_score']:.3f} on the anchor, {spent} rollouts so far"
        )
    if kind == "step":
        note = "" if event["updated"] else f", no update ({event.get('note') or 'every group was flat'})"
        signal = event["groups"] - event["flat_groups"]
        return (
            f"{stamp} {cycle}, step {event['step']}: reward {event['reward_mean']:.3f}, "
            f"{signal} of {event['groups']} groups with signal{note}"
        )
    if not spent:
        when = "before the first cycle"
    else:
        when = cycle if event["cycle"] == before.fast_cycle else f"after cycle {event['cycle']}"
    best = "" if before.val_best is None or event["score"] <= before.val_best else ", the best so far"
    return f"{stamp} {when}: {event['split']} score {event['score']:.3f}, KL to base {event['kl_to_base']:.4f}{best}"


@contextmanager
def run_display(console: Console, config: FSTConfig) -> Iterator[Callback]:
    """A callback for `FST(callbacks=...)` that shows the run on this console while the context is open."""
    say(console, "loading the model ...")
    with BarDisplay(console, config) if console.is_terminal else nullcontext(PlainDisplay(console)) as callback:
        yield callback


class PlainDisplay:
    """One line an event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.snapshot = Snapshot()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        line = line_of(event, self.snapshot)
        self.snapshot = advance(self.snapshot, event)
        if line:
            say(self.console, line)


class BarDisplay(progress.Progress):
    """A bar for the run, one for its phase, and the latest numbers; the lines of `PlainDisplay` scroll above."""

    def __init__(self, console: Console, config: FSTConfig) -> None:
        self.lines = PlainDisplay(console)  # Progress renders itself while it is made
        super().__init__(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(20),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=math.inf,
        )
        self.config = config
        self.run = self.add_task(self._title(Snapshot()), total=1.0)
        self.phase = self.add_task("loading the model", total=None)

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        before = self.lines.snapshot
        self.lines(event)
        now = self.lines.snapshot
        name = PHASES.get(now.phase, "working")
        if now.phase != before.phase or now.done < before.done:
            self.remove_task(self.phase)
            self.phase = self.add_task(name, total=now.total if now.phase else None)
        title = f"{name} {now.done}/{now.total}" if now.phase else name
        self.update(self.phase, description=title, completed=now.done)
        # The first share that is not 0 only starts the clock of rich's estimate: a resumed run begins in the middle.
        self.update(self.run, description=self._title(now), completed=share_done(now, self.config))

    def _title(self, now: Snapshot) -> str:
        cycles = self.config.budget.max_cycles
        return f"cycle {min(now.cycle + 1, cycles)}/{cycles}   step {now.step}"

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars and the numbers; rich asks for them a few times a second."""
        if self.lines.snapshot.waiting:
            yield Text(self.lines.snapshot.waiting)
            return
        yield from super().get_renderables()
        speed = next((task.speed for task in self.tasks[1:]), None)
        yield Text(f"{self.lines.snapshot.numbers()}   {'-' if speed is None else f'{speed:.0f}'} rollouts/s")
