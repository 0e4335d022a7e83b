"""What a run shows while it goes: a live panel on a terminal, one line an event elsewhere.

`advance` folds the lines of `metrics.jsonl` and the progress events into a `Snapshot`; two displays show it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.text import clock, eta_s, plain
from fst_optimizer.types import RolloutCounts

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fst_optimizer.store.metrics import Callback

Event = Mapping[str, Any]
PHASES = {
    "fast": "evolving prompts",
    "slow": "collecting rollouts",
    "eval": "validating",
    "test": "scoring the test set",
}


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment."""

    waiting: str = ""
    """What the run waits for before anything else, e.g. a server that starts."""
    phase: str = ""
    done: int = 0
    """Rollouts of this phase that ended."""
    total: int = 0
    phase_started_s: float = 0.0
    now_s: float = 0.0
    """The caller's clock."""
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

    @property
    def rate(self) -> float | None:
        """Rollouts per second in this phase. None before there is one."""
        seconds = self.now_s - self.phase_started_s
        return self.done / seconds if self.done and seconds > 0 else None


def advance(before: Snapshot, event: Event, now_s: float) -> Snapshot:
    """The snapshot after one event."""
    if event["kind"] == "progress":
        return _progressed(before, event, now_s)
    if event["kind"] == "waiting":
        return replace(before, waiting=f"starting vLLM, {clock(event['seconds'])}: {plain(event['text'])[:90]}")
    after = replace(
        before,
        phase="",
        waiting="",
        now_s=now_s,
        cycle=event["cycle"],
        step=event["step"],
        rollouts=RolloutCounts(**event["rollouts"]),
    )
    if event["kind"] == "fast":
        return replace(after, frontier=event.get("frontier", event["population"]), fast_cycle=event["cycle"])
    if event["kind"] == "step":
        return replace(after, reward=event["reward_mean"])
    score = event["score"]
    first = score if before.val_first is None else before.val_first
    best = max(score, before.val_best if before.val_best is not None else score)
    return replace(after, val_first=first, val_score=score, val_best=best, kl=event["kl_to_base"])


def _progressed(before: Snapshot, event: Event, now_s: float) -> Snapshot:
    phase, done = event["phase"], event["done"]
    fresh = phase != before.phase or done < before.done
    started = now_s if fresh else before.phase_started_s
    # A phase starts when its first rollout ends, as far as events tell; its own rate then counts from there.
    return replace(
        before, waiting="", phase=phase, done=done, total=event["total"], phase_started_s=started, now_s=now_s
    )


def share_done(snapshot: Snapshot, config: FSTConfig) -> float:
    """How much of the run is done, in [0, 1], by the limit that is nearer: rollouts or cycles."""
    steps = config.train.steps_per_cycle
    within = (snapshot.step % steps) / steps if config.method in ("fst", "rl") else 0.0
    shares = [(snapshot.cycle + within) / config.budget.max_cycles]
    if config.budget.max_steps:
        shares.append(snapshot.step / config.budget.max_steps)
    if config.budget.max_rollouts:
        running = snapshot.done if snapshot.phase in ("fast", "slow") else 0
        shares.append((snapshot.rollouts.training + running) / config.budget.max_rollouts)
    return min(1.0, max(shares))


def line_of(event: Event, before: Snapshot) -> str | None:
    """One line for people about a line of `metrics.jsonl`; None for progress events, which come too often."""
    kind = event["kind"]
    if kind == "progress":
        return None
    if kind == "waiting":
        return None if before.waiting else "starting vLLM, which takes half a minute or more ..."
    spent = RolloutCounts(**event["rollouts"]).training
    stamp = f"[{clock(event['time_s'])}]"
    head = f"{stamp} cycle {event['cycle'] + 1}"
    if kind == "fast":
        return (
            f"{head}: prompts evolved, {event['proposals']} proposed, {event['accepted']} accepted, "
            f"population {event['population']}, best {event['best_score']:.3f} on the anchor, {spent} rollouts so far"
        )
    if kind == "step":
        note = "" if event["updated"] else f", no update ({event.get('note') or 'every group was flat'})"
        signal = event["groups"] - event["flat_groups"]
        return (
            f"{head}, step {event['step']}: reward {event['reward_mean']:.3f}, "
            f"{signal} of {event['groups']} groups with signal{note}"
        )
    best = "" if before.val_best is None or event["score"] <= before.val_best else ", the best so far"
    score = f"{event['split']} score {event['score']:.3f}, KL to base {event['kl_to_base']:.4f}"
    return f"{stamp} {_moment(event, before)}: {score}{best}"


def _moment(event: Event, before: Snapshot) -> str:
    """Which evaluation this is."""
    if not RolloutCounts(**event["rollouts"]).training:
        return "before the first cycle"
    return f"cycle {event['cycle'] + 1}" if event["cycle"] == before.fast_cycle else f"after cycle {event['cycle']}"


@contextmanager
def display(console: Console, config: FSTConfig) -> Iterator[Callback]:
    """A callback for `FST(callbacks=...)` that shows the run on this console while the context is open."""
    if not console.is_terminal:
        yield Plain(console)
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=4, transient=True) as live:
        panel = Panel(console, config, live)
        live.update(panel)
        yield panel


class Plain:
    """One line an event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.snapshot = Snapshot()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        line = line_of(event, self.snapshot)
        self.snapshot = advance(self.snapshot, event, time.monotonic())
        if line:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Panel(Plain):
    """The same lines, scrolling above a panel with the moment's numbers."""

    def __init__(self, console: Console, config: FSTConfig, live: Any) -> None:
        super().__init__(console)
        self.config = config
        self.live = live
        self.started_s = time.monotonic()
        self.share_before: float | None = None

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        super().__call__(event)
        if self.share_before is None:
            # A resumed run starts in the middle: the pace is measured from here.
            self.share_before = share_done(self.snapshot, self.config)

    def __rich__(self) -> RenderableType:
        """The panel; rich asks for it a few times a second."""
        from rich import box
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        share = share_done(self.snapshot, self.config)
        words = Text("\n").join(Text(line) for line in self.lines(share))
        return Box(Group(words, ProgressBar(total=1.0, completed=share, width=60)), box=box.ROUNDED, expand=False)

    def lines(self, share: float) -> list[str]:
        """The panel's text."""
        now, config = self.snapshot, self.config
        if now.waiting:
            return [now.waiting]
        elapsed_s = time.monotonic() - self.started_s
        left_s = eta_s(self.share_before or 0.0, share, elapsed_s)
        cycle = min(now.cycle + 1, config.budget.max_cycles)
        doing = f"{PHASES.get(now.phase, 'updating the weights')} {now.done}/{now.total}" if now.phase else "working"
        rate = f"{now.rate:.0f} rollouts/s" if now.rate else "- rollouts/s"
        return [
            f"cycle {cycle}/{config.budget.max_cycles}   step {now.step}   {doing}   {rate}",
            f"reward {_number(now.reward)}   frontier {now.frontier or '-'}   validation {_number(now.val_score)} "
            f"(first {_number(now.val_first)}, best {_number(now.val_best)})   KL {now.kl:.4f}",
            f"rollouts fast {now.rollouts.fast} slow {now.rollouts.slow} eval {now.rollouts.eval}   "
            f"elapsed {clock(elapsed_s)}   left {clock(left_s) if left_s is not None else '-'}",
        ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
