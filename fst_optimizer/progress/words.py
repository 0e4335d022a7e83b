"""What is said of a run: a line for each event that is worth one, and the numbers that stand below them."""

from __future__ import annotations

from collections.abc import Iterator

from fst_optimizer.progress.diff import diff
from fst_optimizer.progress.snapshot import Event, Snapshot
from fst_optimizer.progress.tables import number
from fst_optimizer.store.tally import commonest_failure
from fst_optimizer.text import clock, plain
from fst_optimizer.types import RolloutCounts

PHASES = {
    "fast": "evolving prompts",
    "slow": "collecting rollouts",
    "eval": "validating",
    "kl": "measuring KL",
    "test": "scoring the test set",
}
HEARTBEAT_S = 60.0
"""After so long without a line, how far the phase is gets one."""


def lines_of(event: Event, before: Snapshot, now: Snapshot, last_line_s: float) -> Iterator[str]:
    """Lines for people about an event. `before` and `now`: what was known of the run before it, and is with it.

    `last_line_s`: when the last line was shown, on the run's clock.
    """
    kind = event["kind"]
    if kind == "waiting":
        if not before.waiting:
            yield "starting vLLM, which takes half a minute or more ..."
    elif kind == "start":
        if event["resumed"]:
            yield _resumed(now)
    elif kind == "plan":
        yield f"plan: {event['text']}"
    elif kind == "progress":
        if event["time_s"] - last_line_s >= HEARTBEAT_S:
            yield f"{_stamp(event)} {_phase(now)}{_left(now)}"
    elif kind == "accepted":
        yield from _accepted(event, now)
    elif kind == "fast":
        yield from _decided(event, now)
        yield _fast(event, now)
    elif kind == "step":
        yield from _decided(event, now)
        yield _step(event, now)
    elif kind == "eval":
        yield _eval(event, before, now)


def panel(snapshot: Snapshot, now_s: float, width: int = 24) -> list[str]:
    """The latest of everything, in four lines; `now_s` is the run's clock, `width` that of the bar."""
    if snapshot.waiting:
        return [snapshot.waiting]
    if snapshot.plan is None:
        return ["getting ready"]
    counts, left = snapshot.rollouts, snapshot.left(now_s)
    seconds = now_s - snapshot.pace.began_s
    speed = f"{snapshot.pace.rollouts / seconds:.0f} rollouts/s" if snapshot.pace.rollouts and seconds > 0 else ""
    share = 0.0 if left is None or not now_s else now_s / (now_s + left.seconds)
    bar = f"[{'#' * round(width * share):.<{width}}]"
    return [
        f"{_cycle(snapshot)}   {_steps(snapshot)}   {clock(now_s)} {bar} {left_text(snapshot, now_s)}".rstrip(),
        f"{_phase(snapshot)}   {speed}".rstrip(),
        f"reward {number(snapshot.reward)}   frontier {snapshot.frontier or '-'}   validation "
        f"{number(snapshot.val_score)} (first {number(snapshot.val_first)}, best {number(snapshot.val_best)})   "
        f"KL {snapshot.kl:.4f}",
        f"rollouts fast {counts.fast} slow {counts.slow} eval {counts.eval}   {_failures(snapshot)}   "
        f"{snapshot.tokens:,} tokens",
    ]


def left_text(snapshot: Snapshot, now_s: float) -> str:
    """`about 3:10 left`, without `about` once every kind of phase that is left was measured; "" while unknown."""
    left = snapshot.left(now_s)
    if left is None or snapshot.plan is None:
        return ""
    early = "at most " if snapshot.plan.may_end_early else ""
    return f"{'' if left.sure else 'about '}{early}{clock(left.seconds)} left"


def _stamp(event: Event) -> str:
    return f"[{clock(event['time_s'])}]"


def _cycle(now: Snapshot, cycle: int | None = None) -> str:
    """`cycle 2 of 4`, by the number of cycles done before it."""
    done = now.at.cycle if cycle is None else cycle
    if now.plan is None:
        return f"cycle {done + 1}"
    return f"cycle {min(done + 1, now.plan.cycles)} of {now.plan.cycles}"


def _steps(now: Snapshot) -> str:
    """`step 7 of 24`; `of about` where what fast rounds take decides how many follow."""
    if not now.steps or now.plan is None:
        return f"step {now.step}"
    return f"step {now.step} of {'' if now.plan.max_rollouts is None else 'about '}{now.steps}"


def _phase(now: Snapshot) -> str:
    name = PHASES.get(now.phase, "working")
    if now.phase == "slow" and now.total and now.done >= now.total:
        return "updating the weights"
    return f"{name}, {now.done} of {now.total}" if now.total else name


def _failures(now: Snapshot) -> str:
    ended = sum(now.outcomes.values())
    found = commonest_failure(now.outcomes)
    return f"failed {now.failed} of {ended}{f', mostly {found[0]}' if found else ''}"


def _left(now: Snapshot) -> str:
    text = left_text(now, now.time_s)
    return f"; {text}" if text else ""


def _resumed(now: Snapshot) -> str:
    return (
        f"[{clock(now.time_s)}] resumed in {_cycle(now)}, after step {now.step}: validation {number(now.val_score)} "
        f"(first {number(now.val_first)}, best {number(now.val_best)}), KL to base {now.kl:.4f}, "
        f"{now.rollouts.training} rollouts so far"
    )


def _accepted(event: Event, now: Snapshot) -> Iterator[str]:
    scores = f"{event['parent_score']:.3f} -> {event['score']:.3f} on the anchor"
    for name, text in event["after"].items():
        yield f"{_stamp(event)} {_cycle(now, event['cycle'])}: new instruction for {plain(name)}, {scores}"
        yield f"    {plain(diff(event['before'][name], text))}"


def _decided(event: Event, now: Snapshot) -> Iterator[str]:
    """What a cycle does and why, where that was decided: with its first line."""
    if decided := event.get("allocation"):
        parts = []
        if decided["proposals"]:
            parts.append(f"prompts, up to {decided['proposals']} proposals")
        elif decided["examples"]:
            parts.append(f"candidates scored on {decided['examples']} examples")
        if decided["steps"]:
            parts.append(f"weights, up to {decided['steps']} steps")
        what = ", then ".join(parts) or "nothing"
        yield f"{_stamp(event)} {_cycle(now, event['cycle'])} goes to {what}: {plain(event['reason'])}"


def _fast(event: Event, now: Snapshot) -> str:
    spent = RolloutCounts(**event["rollouts"]).training
    over = f"; no more fast rounds: {plain(event['search_over'])}" if event.get("search_over") else ""
    return (
        f"{_stamp(event)} {_cycle(now, event['cycle'])}: prompts evolved, {event['proposals']} proposed, "
        f"{event['accepted']} accepted, population {event['population']}, best {event['best_score']:.3f} on the "
        f"anchor, {spent} rollouts so far{over}{_left(now)}"
    )


def _step(event: Event, now: Snapshot) -> str:
    note = "" if event["updated"] else f", no update ({event.get('note') or 'every group was flat'})"
    signal, failed = event["groups"] - event["flat_groups"], event.get("failed", 0)
    found = commonest_failure(event.get("outcomes", {}))
    failures = f", {failed} failed (mostly {found[0]})" if failed and found else ""
    return (
        f"{_stamp(event)} {_cycle(now, event['cycle'])}, {_steps(now)}: reward {event['reward_mean']:.3f}, "
        f"{signal} of {event['groups']} groups with signal{failures}{note}{_left(now)}"
    )


def _eval(event: Event, before: Snapshot, now: Snapshot) -> str:
    cycle = _cycle(now, event["cycle"])
    when = {"first eval": "before the first cycle", "eval of prompts": f"{cycle}, new prompts"}.get(
        now.at.stage, f"after {cycle}"
    )
    best = "" if before.val_best is None or event["score"] <= before.val_best else ", the best so far"
    return (
        f"{_stamp(event)} {when}: {event['split']} score {event['score']:.3f}, "
        f"KL to base {event['kl_to_base']:.4f}{best}"
    )
