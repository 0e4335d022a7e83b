"""Where the next rollouts go: to the prompts, to the weights, or to telling two candidates apart. Pure functions.

A bandit with two arms. What is known of each is a normal posterior over its gain in score per rollout: of the prompts,
the anchor mean of the best candidate before and after a fast round (same version, same examples); of the weights, the
slope of the reward over slow steps under the same prompts. Both have the noise of their examples. Gains fade, so old
evidence counts less: by half with every round of the prompts and with every change of the prompts that are trained
under, and that of the prompts also as the weights move. The next arm is drawn by Thompson sampling, by a seed that
follows from the run's seed and the cycle; a share of the rollouts is each side's own, whatever the draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from fst_optimizer.run.gains import BETTER, LEAST_SPREAD, Evidence, Point, leader, luck, paired, slope
from fst_optimizer.types import Candidate, Stored

KEPT = 0.5
"""Of what is known of a side, when it is known to be older."""
MOVED_KL = 0.1
"""Nats a token between fast rounds after which 1/e of what is known of the prompts is left."""
LEAST_KEPT = 0.05
"""Of what is known of the prompts, however far the weights moved."""
WINDOW = 12
"""Slow steps that the slope of the reward is taken over, the last ones."""
FLOOR = 0.1
"""Share of the rollouts that each side gets, where it can use them."""
SURE = 0.75
"""Chance of being the better side from which it gets a whole phase; below it gets half of one."""


@dataclass(frozen=True)
class Allocation(Stored):
    """What a cycle does, and why."""

    proposals: int
    """Most reflective mutations of its fast round."""
    examples: int
    """That its fast round scores candidates on. 0: it has none."""
    steps: int
    """Most slow steps."""
    reason: str
    told: bool = False
    """Whether a line of `metrics.jsonl` has it."""


@dataclass(frozen=True)
class Ledger(Stored):
    """What is known for the next decision."""

    now: Allocation | None = None
    """The cycle's that is under way."""
    prompts: Evidence = field(default_factory=Evidence)
    weights: Evidence = field(default_factory=Evidence)
    """Of slow steps under other prompts than now; those under the present ones are `points`."""
    points: tuple[Point, ...] = ()
    spent_prompts: int = 0
    """Rollouts since the start or the last switch."""
    spent_weights: int = 0
    waiting: tuple[Candidate, ...] = ()
    """Candidates of the frontier that are not trained under: they do not lead the seed by enough."""
    lead: tuple[float, float] | None = None
    """By how much the best prompt leads the seed at the last fast round, less its luck, and the noise. None: the seed
    is the best."""
    compared: bool = False
    """Whether the candidates were scored on more examples since something was last proposed."""
    round_version: int | None = None
    """Of the last fast round. None: there was none since the start or the last switch."""
    round_kl: float = 0.0
    """KL to the base at that round."""
    barren: bool = False
    """Whether there was nothing new to try in it."""
    closed: bool = False
    """Whether nothing can be proposed any more."""
    switched: bool = False
    flat: tuple[str, ...] = ()
    """Examples whose groups were flat at this version under these prompts."""
    still: int = 0
    """Slow steps in a row that changed nothing."""


@dataclass(frozen=True)
class Means:
    """What the next cycle can be paid with, and what each side's phases take."""

    rollouts: int
    """Left to the run."""
    round_rollouts: int
    """Most of a fast round."""
    proposals: int
    """Most of a fast round. 0: nothing can be proposed any more."""
    examples: int
    """Of an anchor."""
    candidates: int
    """To be scored in a fast round, the seed among them."""
    steps: int
    """Most of a cycle."""
    step_rollouts: int
    version: int
    kl: float
    """To the base, as last measured."""

    @property
    def rescoring(self) -> int:
        """Rollouts with which a fast round begins."""
        return self.examples * self.candidates


def decide(ledger: Ledger, means: Means, draw: str) -> Allocation:
    """What the next cycle does. `draw` is the seed of the sample from the posteriors.

    Never more than `means` pays for. Nothing at all only where that is too little for a step, and for a fast round that
    could find something.
    """
    pays_round = means.rescoring <= min(means.rollouts, means.round_rollouts)
    pays_step = bool(means.steps) and means.step_rollouts <= means.rollouts
    idle = _idle_prompts(ledger, means)
    if not pays_step:
        why = f"{means.rollouts} rollouts are left, too few for a slow step ({means.step_rollouts})"
        return _round(means, why) if pays_round and not idle else Allocation(0, 0, 0, why)
    if not pays_round:
        return _steps(means, f"a fast round begins with {means.rescoring} rollouts, more than it may spend")
    if ledger.switched:
        return _round(means, "a switch of the task was noticed")
    if ledger.round_version is None:
        return _round(means, "nothing is known of the prompts yet")
    if owed := _owed(ledger, means):
        return owed
    if idle:
        return _steps(means, idle)
    if worn_out(ledger, means.steps):
        return _round(means, f"in {ledger.still} slow steps in a row every group was flat")
    return _drawn(ledger, means, draw)


def after_round(
    ledger: Ledger,
    scores: Mapping[str, Mapping[str, float]],
    before: Iterable[str],
    seed: str,
    *,
    rollouts: int,
    accepted: int,
    outlook: str,
    version: int,
    kl: float,
) -> Ledger:
    """After a fast round. `scores`: of all that it scored, at this version; `before`: ids that it began with."""
    searched = ledger.now is None or ledger.now.proposals > 0
    told = replace(
        ledger,
        spent_prompts=ledger.spent_prompts + rollouts,
        switched=False,
        barren=outlook == "barren" if searched else ledger.barren and version == ledger.round_version,
        closed=ledger.closed or (searched and outlook == "closed"),
        compared=not searched,
        round_version=version,
        round_kl=kl,
    )
    old, best = leader(scores, before), leader(scores, scores)
    if old is None or best is None:
        return told  # nothing could be scored
    if searched:
        gain, noise = paired(scores[best], scores[old])
        gain -= noise * luck(accepted)
        kept = _still_true(ledger, kl) * KEPT
        told = replace(told, prompts=ledger.prompts.kept(kept).plus(gain, noise, rollouts))
    if best == seed or seed not in scores:
        return replace(told, lead=None)
    gain, noise = paired(scores[best], scores[seed])
    return replace(told, lead=(gain - noise * luck(accepted), noise))


def after_step(
    ledger: Ledger, rewards: Mapping[str, float], flat: Iterable[str], *, rollouts: int, spent: int, updated: bool
) -> Ledger:
    """After a slow step. `rewards`: the mean of each example; `flat`: those whose group was; `spent`: all slow ones."""
    points = ledger.points
    if rewards:
        mean = math.fsum(rewards.values()) / len(rewards)
        squares = math.fsum((one - mean) ** 2 for one in rewards.values()) / max(1, len(rewards) - 1)
        points = (*points, Point(spent, mean, max(squares, LEAST_SPREAD**2) / len(rewards)))[-WINDOW:]
    return replace(
        ledger,
        points=points,
        spent_weights=ledger.spent_weights + rollouts,
        flat=() if updated else tuple(dict.fromkeys((*ledger.flat, *flat))),
        still=0 if updated else ledger.still + 1,
    )


def under_others(ledger: Ledger) -> Ledger:
    """Other prompts are trained under from now on: rewards start from another level, and flat groups may not be."""
    return replace(ledger, weights=known_of_weights(ledger).kept(KEPT), points=(), flat=(), still=0)


def after_switch(ledger: Ledger) -> Ledger:
    """The task is another one: of gains, nothing is known any more."""
    return Ledger(now=ledger.now, waiting=ledger.waiting, round_kl=ledger.round_kl, switched=True)


def worn_out(ledger: Ledger, steps: int) -> bool:
    """Whether so many more steps would find what the last ones found: groups without signal."""
    return ledger.still >= steps


def known_of_weights(ledger: Ledger) -> Evidence:
    """What is known of the weights' gain, under these prompts and others."""
    found = slope(ledger.points)
    return ledger.weights if found is None else ledger.weights.plus(*found, rollouts=1)


def posteriors(ledger: Ledger, means: Means) -> tuple[NormalDist, NormalDist]:
    """The gain per rollout of the prompts and of the weights."""
    prompts = ledger.prompts.kept(_still_true(ledger, means.kl))
    return (
        prompts.posterior(means.round_rollouts),
        known_of_weights(ledger).posterior(means.steps * means.step_rollouts),
    )


def _still_true(ledger: Ledger, kl: float) -> float:
    """The share of what is known of the prompts that still counts, now that the weights have moved."""
    return max(LEAST_KEPT, math.exp(-abs(kl - ledger.round_kl) / MOVED_KL))


def _idle_prompts(ledger: Ledger, means: Means) -> str:
    """Why a fast round would repeat the last one; "" where it would not."""
    if not means.proposals:
        return "nothing can be proposed any more"
    if ledger.barren and ledger.round_version == means.version:
        return f"the last fast round had nothing new to try, and the weights are still version {means.version}"
    return ""


def _owed(ledger: Ledger, means: Means) -> Allocation | None:
    """A turn of the side that had less than its share, where one phase of it is owed."""
    total = ledger.spent_prompts + ledger.spent_weights
    again = ledger.round_version != means.version or not _idle_prompts(ledger, means)
    for side, spent, least in (
        ("the weights", ledger.spent_weights, means.step_rollouts),
        ("the prompts", ledger.spent_prompts, means.rescoring),
    ):
        owed = FLOOR * total - spent
        if owed < least or (side == "the prompts" and not again):
            continue
        why = f"{side} had {spent} of {total} rollouts, and {FLOOR:.0%} are theirs"
        if side == "the weights":
            return _steps(means, why, math.ceil(owed / means.step_rollouts))
        return _round(means, why, half=True)
    return None


def _drawn(ledger: Ledger, means: Means, draw: str) -> Allocation:
    """Thompson sampling: one draw from each posterior, and the larger one has its turn."""
    prompts, weights = posteriors(ledger, means)
    rng = random.Random(draw)
    drawn = [rng.gauss(one.mean, one.stdev) for one in (prompts, weights)]
    known = [f"{1000 * one.mean:.2f} ± {1000 * one.stdev:.2f}" for one in (prompts, weights)]
    why = (
        f"gain in 1,000 rollouts: prompts {known[0]}, weights {known[1]}; drawn {1000 * drawn[0]:.2f} and "
        f"{1000 * drawn[1]:.2f}"
    )
    moved = abs(means.kl - ledger.round_kl)
    if moved >= MOVED_KL / 10:
        why += f"; the weights moved by {moved:.3f} nats a token since the last fast round"
    chance = NormalDist().cdf((prompts.mean - weights.mean) / math.hypot(prompts.stdev, weights.stdev))
    if drawn[0] >= drawn[1]:
        return _round(means, why, half=chance < SURE)
    chosen = _steps(means, why, means.steps if 1 - chance >= SURE else math.ceil(means.steps / 2))
    return _told_apart(ledger, means, chosen)


def _told_apart(ledger: Ledger, means: Means, chosen: Allocation) -> Allocation:
    """The same steps, after candidates were scored on more examples, where it is open which to train under."""
    examples = min(2 * means.examples, means.round_rollouts // means.candidates)
    left = means.rollouts - examples * means.candidates
    if ledger.lead is None or ledger.compared or examples <= means.examples or left < means.step_rollouts:
        return chosen
    gain, noise = ledger.lead
    if not 0 < gain < BETTER * noise:
        return chosen
    why = f"the best prompt leads the seed by {gain:.3f} ± {noise:.3f} only, so they are scored on {examples} examples"
    steps = min(chosen.steps, left // means.step_rollouts)
    return replace(chosen, examples=examples, steps=steps, reason=f"{chosen.reason}; {why}")


def _round(means: Means, why: str, *, half: bool = False) -> Allocation:
    proposals = math.ceil(means.proposals / 2) if half else means.proposals
    return Allocation(proposals, means.examples, 0, why)


def _steps(means: Means, why: str, steps: int | None = None) -> Allocation:
    wanted = means.steps if steps is None else min(steps, means.steps)
    return Allocation(0, 0, min(wanted, means.rollouts // means.step_rollouts), why)
