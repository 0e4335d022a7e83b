"""Whether the best configuration is better, or was lucky.

The leading ones get more seeds, and the winner is set beside the preset on a split that the study never used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.stats import mean_ci
from fst_optimizer.store.files import RunFiles, read_json

TOP = 3
"""Configurations that get more seeds."""
REPEAT_SEEDS, CONFIRM_SEEDS = 1000, 2000
"""Added to the study's seed for them. The winner is chosen on other runs than those that confirm it."""


@dataclass(frozen=True)
class Repeat:
    """One more run of a configuration."""

    label: str
    """Which configuration: a trial's number, `best` or `preset`."""
    settings: Settings
    """With the run's own seed."""
    folder: Path


RunAll = Callable[[Sequence[Repeat]], None]
"""Makes the runs that are not there yet."""


def repeats_of(label: str, settings: Settings, folder: Path, first_seed: int, count: int) -> list[Repeat]:
    """`count` runs with seeds from the first one on."""
    return [
        Repeat(
            label,
            replace(settings, config=settings.config.changed(seed=first_seed + number)),
            folder / f"{label}-seed{first_seed + number}",
        )
        for number in range(count)
    ]


def read_scores(repeats: Sequence[Repeat], split: str) -> list[float]:
    """The runs' final scores on a split, `val` or `test`."""
    return [read_json(RunFiles(repeat.folder).result)[f"{split}_score_after"] for repeat in repeats]


def leading(rows: Sequence[Mapping[str, Any]], count: int = TOP) -> list[Mapping[str, Any]]:
    """The complete trials with the best scores, each configuration once."""
    found: list[Mapping[str, Any]] = []
    complete = [row for row in rows if row["state"] == "complete"]
    for row in sorted(complete, key=lambda row: (-row["score"], row["trial"])):
        if all(row["params"] != other["params"] for other in found):
            found.append(row)
    return found[:count]


def pick(scores: Mapping[int, Sequence[float]]) -> int:
    """The trial whose repeats have the best mean; the earliest of equals."""
    return max(sorted(scores), key=lambda trial: sum(scores[trial]) / len(scores[trial]))


def comparison(best: Sequence[float], preset: Sequence[float]) -> dict[str, Any]:
    """Both on the split that the study never used, paired by seed."""
    difference = [ours - theirs for ours, theirs in zip(best, preset, strict=True)]
    return {
        "best": {"scores": list(best), **(mean_ci(best) or {})},
        "preset": {"scores": list(preset), **(mean_ci(preset) or {})},
        "difference": {"values": difference, **(mean_ci(difference) or {})},
        "verdict": verdict(difference),
    }


def verdict(differences: Sequence[float]) -> str:
    """Whether differences by seed are larger than the noise: their 95% interval leaves 0 out."""
    found = mean_ci(differences)
    if found is None or found["low"] is None:
        return "one seed does not tell a difference from noise"
    if found["low"] > 0:
        return "better than the preset, by more than the noise"
    if found["high"] < 0:
        return "worse than the preset, by more than the noise"
    return "no difference from the preset that is larger than the noise"
