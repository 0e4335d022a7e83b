"""Whether the best configuration is better, or was lucky.

The leading ones get more seeds, and the winner is set beside the preset on a split that the study never used.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.lab.launch import run_all
from fst_optimizer.lab.plan import Common, Job
from fst_optimizer.stats import mean_ci
from fst_optimizer.store.files import RunFiles, read_json, write_json
from fst_optimizer.tuning.study import StudyPlan, settings_json

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.lab.launch import Tell
    from fst_optimizer.task_run import RunRequest
    from fst_optimizer.tuning.request import TuneRequest
    from fst_optimizer.tuning.runner import TrialRunner

logger = logging.getLogger(__name__)
TOP = 3
"""Configurations that get more seeds."""
REPEAT_SEEDS, CONFIRM_SEEDS = 1000, 2000
"""Added to the study's seed for them. The winner is chosen on other runs than those that confirm it."""


@dataclass(frozen=True)
class Repeat:
    """One more run of a configuration."""

    label: str
    """Which configuration: a trial's number, or `preset`."""
    settings: Settings
    """With the run's own seed."""
    folder: Path

    def score(self, split: str) -> float:
        """The run's final score on `val` or `test`."""
        score: float = read_json(RunFiles(self.folder).result)[f"{split}_score_after"]
        return score


RunRepeats = Callable[[Sequence[Repeat]], None]
"""Makes the runs that are not there yet."""


def confirm_winner(
    summary: Mapping[str, Any], plan: StudyPlan, request: TuneRequest, run_repeats: RunRepeats
) -> dict[str, Any]:
    """The leading configurations with more seeds, the one that wins, and that one beside the preset."""

    def repeats(label: str, settings: Settings, kind: str, first: int) -> list[Repeat]:
        start = plan.settings.config.seed + first
        return [
            Repeat(
                label,
                replace(settings, config=settings.config.with_values({"seed": seed})),
                request.folder / kind / f"{label}-seed{seed}",
            )
            for seed in range(start, start + request.repeats)
        ]

    settings = {row["trial"]: plan.settings_of(row["params"]) for row in leading(summary["trials"])}
    runs = {trial: repeats(f"trial-{trial:06d}", one, "repeats", REPEAT_SEEDS) for trial, one in settings.items()}
    run_repeats([run for some in runs.values() for run in some])
    scores = {trial: [run.score("val") for run in some] for trial, some in runs.items()}
    best = pick(scores)
    name, preset = next(iter(plan.presets.items()))
    ours = repeats(f"trial-{best:06d}", settings[best], "confirm", CONFIRM_SEEDS)
    theirs = repeats("preset", preset, "confirm", CONFIRM_SEEDS)
    run_repeats([*ours, *theirs])
    about = {"name": name, "seeds": [run.settings.config.seed for run in ours]}
    compared = comparison([run.score("test") for run in ours], [run.score("test") for run in theirs])
    return {
        "best": best,
        "repeats": [{"trial": trial, "scores": some, **(mean_ci(some) or {})} for trial, some in scores.items()],
        "confirmation": {**about, **compared},
    }


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


def repeats_here(runner: TrialRunner, testset: Sequence[dspy.Example]) -> RunRepeats:
    """Makes runs in this process, one after the other; one that was interrupted is begun again."""

    def run(repeats: Sequence[Repeat]) -> None:
        for repeat in repeats:
            if not RunFiles(repeat.folder).result.exists():
                shutil.rmtree(repeat.folder, ignore_errors=True)
                runner.run(repeat.settings, repeat.folder, testset=testset)
                logger.info("%s, seed %d, is done", repeat.label, repeat.settings.config.seed)

    return run


def repeats_of_task(request: TuneRequest, choices: RunRequest, plan: StudyPlan, tell: Tell) -> RunRepeats:
    """Makes runs as `fst compile` would, as many at a time as there are workers."""

    def run(repeats: Sequence[Repeat]) -> None:
        jobs = []
        for repeat in repeats:
            path = repeat.folder.parent / f"{repeat.label}.json"
            write_json(path, settings_json(repeat.settings))
            config = repeat.settings.config
            method = f"{config.method}@{choices.engine}" if choices.engine else config.method
            sets = tuple(pair for pair in choices.sets if pair.startswith("vllm."))
            common = Common(plan.cap, sets, choices.model, choices.sizes, path, choices.reflection_lm)
            jobs.append(Job(choices.task, method, config.seed, repeat.folder, common))
        run_all(jobs, at_once=request.workers, tell=tell)

    return run
