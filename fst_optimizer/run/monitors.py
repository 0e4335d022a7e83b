"""What says that a run goes wrong: pure functions over the numbers of its steps and evaluations.

Each monitor is off, warns, or pauses the run. What it has seen so far is a `Watch`, part of the run's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from fst_optimizer.config.monitors import MonitorsConfig
from fst_optimizer.store.tally import REMEDIES, UNREADABLE, commonest_failure, tally_of
from fst_optimizer.types import Outcome, Rollout, Stored

if TYPE_CHECKING:
    from fst_optimizer.rollout.credit import Credit
    from fst_optimizer.run.state import ValidationScore
    from fst_optimizer.train.report import StepReport


MOST_CHARACTERS = 200
"""Of an error, in an alarm."""


@dataclass(frozen=True)
class Watch(Stored):
    """What the monitors have seen."""

    flat: int = 0
    """Batches in a row whose groups were all flat."""
    entropy: int = 0
    """Steps in a row with too little entropy."""
    format: int = 0
    """Steps in a row with too many failed formats."""
    rewards: tuple[float, ...] = ()
    """Mean rewards of the steps since the last evaluation."""
    evals: tuple[tuple[float, float], ...] = ()
    """(mean reward before it, validation score) of the last evaluations."""
    best: float | None = None
    """The best validation score at the end of the last cycle."""
    stale: int = 0
    """Cycles in a row without a better validation score."""
    told: tuple[str, ...] = ()
    """Monitors that see what they watch for, and have said so."""
    alarms: tuple[str, ...] = ()
    """All that monitors have said in this run."""


@dataclass(frozen=True)
class Alarm:
    """A monitor that sees what it watches for, for the first time since it last did not."""

    monitor: str
    """Its name in `monitors`."""
    text: str
    """What it saw, and what usually helps."""


def after_step(
    config: MonitorsConfig, watch: Watch, rollouts: Sequence[Rollout], credited: Credit, report: StepReport
) -> tuple[Watch, tuple[Alarm, ...]]:
    """What the monitors make of one slow step; `watch` is what they had seen before."""
    failed_share = sum(rollout.outcome in UNREADABLE for rollout in rollouts) / len(rollouts)
    # A policy that is always right has no entropy left to lose, and a step without an update measures none.
    low = report.entropy < config.entropy_min and credited.reward_mean < config.entropy_unless_reward
    watch = replace(
        watch,
        flat=watch.flat + 1 if credited.flat_groups == credited.groups else 0,
        entropy=watch.entropy if not report.updated else watch.entropy + 1 if low else 0,
        format=watch.format + 1 if failed_share > config.format_max else 0,
        rewards=(*watch.rewards, credited.reward_mean),
    )
    failing = _mostly_failed(rollouts)
    differ = "raise rollout.temperature or rollout.group_size, or give examples that are neither too easy nor too hard"
    reward_format = "raise policy.max_tokens, or give rollout.parse_error_reward a negative number"
    seen = {
        "flat": watch.flat >= config.flat_batches
        and f"in {watch.flat} batches in a row every group had one reward only, so that "
        f"{'rewards taught nothing' if report.updated else 'nothing was learned'}: "
        + (failing or (not credited.rows and credited.unlearned) or differ),
        "entropy": watch.entropy >= config.steps
        and f"entropy was below {config.entropy_min:g} nats a token for {watch.entropy} steps, at a reward of "
        f"{credited.reward_mean:.3f}: the policy gives nearly the same answer every time; lower train.lr, set "
        "train.entropy_coef, or resume from an earlier run",
        "format": watch.format >= config.steps
        and f"more than {config.format_max:.0%} of the rollouts could not be parsed, or were cut, in {watch.format} "
        "steps in a row: "
        + (failing if failed_share == 1 else reward_format),
    }
    return _told(config, watch, seen)


def _mostly_failed(rollouts: Sequence[Rollout]) -> str:
    """What to do where at least half of the rollouts failed: then that is why their rewards are equal."""
    tally = tally_of(rollouts)
    found = commonest_failure(tally.outcomes)
    if found is None or 2 * tally.outcomes.get(Outcome.OK, 0) > tally.total:
        return ""
    outcome, count = found
    first = tally.first_error
    return f"{count} of the last {tally.total} rollouts ended in {outcome} (the first: {first}): {REMEDIES[outcome]}"


def after_loss(
    config: MonitorsConfig, watch: Watch, what: str, lost: int, examples: int, first: str
) -> tuple[Watch, tuple[Alarm, ...]]:
    """What the monitors make of examples that a fast round or a validation left out; `first`: what was raised."""
    if not examples or lost / examples <= config.lost_max:
        return watch, ()  # said once a run: a phase that loses nothing does not take it back
    text = (
        f"{what} left out {lost} of {examples} examples, on which the engine or another LM failed twice (the first: "
        f"{first[:MOST_CHARACTERS]}): {REMEDIES[Outcome.ENGINE_ERROR]}"
    )
    return _told(config, watch, {"lost": text})


def after_eval(
    config: MonitorsConfig, watch: Watch, found: ValidationScore, *, best: float, best_before: float
) -> tuple[Watch, tuple[Alarm, ...]]:
    """What the monitors make of the evaluation at the end of a cycle.

    Args:
        config: Bounds.
        watch: What they had seen before.
        found: The leading candidate's.
        best: The best validation score so far, whatever phase of the cycle found it.
        best_before: That of the start.
    """
    evals = watch.evals
    if watch.rewards:
        evals = (*evals, (sum(watch.rewards) / len(watch.rewards), found.score))[-config.falling_evals - 1 :]
    better = best > (best_before if watch.best is None else watch.best)
    watch = replace(watch, rewards=(), evals=evals, best=best, stale=0 if better else watch.stale + 1)
    pairs = list(pairwise(evals))
    falling = len(pairs) >= config.falling_evals and all(b[0] > a[0] and b[1] < a[1] for a, b in pairs)
    seen = {
        "kl": found.kl_to_base > config.kl_max
        and f"the policy is {found.kl_to_base:.3g} nats a token away from its base, more than {config.kl_max:g}: lower "
        "train.lr, or set train.kl_coef",
        "falling": falling
        and f"over {config.falling_evals} evaluations in a row the validation score fell while the training reward "
        "rose: the program learns its training examples by heart, or games the metric; give more examples",
    }
    return _told(config, watch, seen)


def _told(config: MonitorsConfig, watch: Watch, seen: Mapping[str, str | bool]) -> tuple[Watch, tuple[Alarm, ...]]:
    """Alarms for what is seen and was not before."""
    on = {name: text for name, text in seen.items() if text and getattr(config, name) != "off"}
    alarms = tuple(Alarm(name, str(text)) for name, text in on.items() if name not in watch.told)
    others = tuple(name for name in watch.told if name not in seen)
    said = tuple(f"{alarm.monitor}: {alarm.text}" for alarm in alarms)
    return replace(watch, told=(*others, *on), alarms=(*watch.alarms, *said)), alarms
