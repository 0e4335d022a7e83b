"""The numbers of a comparison, as pure functions: when a curve levels off, who gets there first, and how sure we are.

A curve is a run's validation evaluations in order. Its rollouts are the training ones, fast and slow together: the cost
of learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_optimizer.stats import mean, mean_ci, standard_error

SIGNAL_STEPS = 6
"""Steps at either end of a run that `signal_left` averages over."""


@dataclass(frozen=True)
class Point:
    """One evaluation on the validation set."""

    rollouts: int
    """Fast and slow rollouts so far."""
    score: float
    kl: float
    """KL to base, in nats a token."""


Curve = Sequence[Point]


def curve_of(lines: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The validation curve in the lines of a `metrics.jsonl`.

    Several candidates validated at the same cost are one point: the best of them.
    """
    points: dict[int, Point] = {}
    for line in lines:
        if line["kind"] != "eval" or line["split"] != "val":
            continue
        rollouts = line["rollouts"]["fast"] + line["rollouts"]["slow"]
        point = Point(rollouts, line["score"], line["kl_to_base"])
        if rollouts not in points or point.score > points[rollouts].score:
            points[rollouts] = point
    return [points[rollouts] for rollouts in sorted(points)]


def at_cycle_ends(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines without evaluations between a fast round and the slow steps of its cycle.

    RL has no such evaluation. Without them all methods are evaluated equally often, at the ends of cycles. What tells
    them apart is their place, not their `cycle`: both evaluations of a cycle have its number.
    """
    lines = list(lines)
    last_step = {line["cycle"]: place for place, line in enumerate(lines) if line["kind"] == "step"}
    kept, fast_cycle = [], None
    for place, line in enumerate(lines):
        if line["kind"] == "fast":
            fast_cycle = line["cycle"]
        between = line["cycle"] == fast_cycle and place < last_step.get(fast_cycle, -1)
        if line["kind"] != "eval" or not between:
            kept.append(line)
    return kept


def settled_best(curve: Curve, examples: int) -> Point:
    """The first evaluation within one standard error of the curve's maximum: when the method got where it gets.

    The maximum itself would be noise's choice, and late.
    """
    top = max(point.score for point in curve)
    floor = top - standard_error(top, examples)
    return next(point for point in curve if point.score >= floor)


def first_reaching(curve: Curve, score: float) -> Point | None:
    """The first evaluation with at least this score. None: never."""
    return next((point for point in curve if point.score >= score), None)


def ratio(value: float, reference: float) -> float | None:
    """`value / reference`; None where the reference is 0."""
    return value / reference if reference else None


def last_at(curve: Curve, rollouts: float) -> Point | None:
    """The last evaluation within this many rollouts. None: before the first."""
    return next((point for point in reversed(curve) if point.rollouts <= rollouts), None)


def score_band(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(rollouts, lowest, mean, highest) over seeds, wherever any seed was evaluated.

    Seeds are evaluated at different costs; between its evaluations a seed counts with its last one. The band ends
    with the shortest curve, so that every point is of all seeds.
    """
    end = min(curve[-1].rollouts for curve in curves)
    band = []
    for place in sorted({point.rollouts for curve in curves for point in curve if point.rollouts <= end}):
        scores = [point.score for curve in curves if (point := last_at(curve, place))]
        if len(scores) == len(curves):
            band.append((place, min(scores), mean(scores), max(scores)))
    return band


def against(runs: Mapping[int, Curve], reference: Mapping[int, Curve], examples: int) -> dict[str, Any]:
    """How soon, and how near the base, a method's runs reach the reference method's best, paired by seed.

    Both map a seed to its curve. `pairs` has one entry a seed, with None where the score was never reached; means and
    intervals are over the pairs that reached it.
    """
    pairs = []
    for seed in sorted(set(runs) & set(reference)):
        best = settled_best(reference[seed], examples)
        there = first_reaching(runs[seed], best.score)
        pairs.append(
            {
                "seed": seed,
                "target": best.score,
                "rl_rollouts": best.rollouts,
                "rl_kl": best.kl,
                "rollouts": there.rollouts if there else None,
                "ratio": ratio(there.rollouts, best.rollouts) if there else None,
                "kl": there.kl if there else None,
                "kl_ratio": ratio(there.kl, best.kl) if there else None,
            }
        )
    reached = [pair for pair in pairs if pair["rollouts"] is not None]
    return {
        "pairs": pairs,
        "reached": len(reached),
        "of": len(pairs),
        **{name: mean_ci([pair[name] for pair in reached]) for name in ("rollouts", "ratio", "kl", "kl_ratio")},
    }


def signal_left(lines: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """How much a run's rollouts still differed at its start and at its end; None without slow steps.

    Entropy is that of the sampled tokens, in nats, over steps that trained; `flat` is the share of groups whose
    rewards were all equal, which teach nothing.
    """
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        return None
    ends = {"start": steps[:SIGNAL_STEPS], "end": steps[-SIGNAL_STEPS:]}
    found = {}
    for name, some in ends.items():
        groups = sum(line["groups"] for line in some)
        entropies = [line["entropy"] for line in some if line["groups"] > line["flat_groups"]]
        found[f"flat_{name}"] = sum(line["flat_groups"] for line in some) / groups if groups else 1.0
        found[f"entropy_{name}"] = mean(entropies) if entropies else 0.0
    return found


def search_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How long the search for prompts went on, and whether several prompts were trained under.

    `rounds` of the fast side; proposals `accepted_first`, in the first cycle, and `accepted_later`; `population`, the
    mean of the candidates kept over the rounds; `mixed`, the share of groups whose rollouts were made under more than
    one candidate. None where there was no round, or no group.
    """
    lines = list(lines)
    rounds = [line for line in lines if line["kind"] == "fast"]
    steps = [line for line in lines if line["kind"] == "step"]
    groups = sum(line["groups"] for line in steps)
    return {
        "rounds": len(rounds),
        "accepted_first": sum(line["accepted"] for line in rounds if line["cycle"] == 0),
        "accepted_later": sum(line["accepted"] for line in rounds if line["cycle"] > 0),
        "population": mean([line["population"] for line in rounds]) if rounds else None,
        "mixed": sum(line.get("mixed_groups", 0) for line in steps) / groups if groups else None,
    }
