"""The runs that tell a better configuration from a lucky one, and what comes of them. See `noise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.stats import mean_ci
from fst_optimizer.store.files import write_json
from fst_optimizer.tuning import noise, output
from fst_optimizer.tuning.ask import Ask, Prepared
from fst_optimizer.tuning.study import settings_json

if TYPE_CHECKING:
    from fst_optimizer.lab.launch import Tell


def confirmed(
    summary: Mapping[str, Any], prepared: Prepared, folder: Path, count: int, run_all: noise.RunAll
) -> dict[str, Any]:
    """The leading configurations with more seeds, the one that wins, and that one beside the preset."""
    plan, seed = prepared.plan, prepared.plan.settings.config.seed
    leading = {row["trial"]: output.trial_settings(row["params"], plan) for row in noise.leading(summary["trials"])}
    repeats = {
        trial: noise.repeats_of(f"trial-{trial:06d}", settings, folder / "repeats", seed + noise.REPEAT_SEEDS, count)
        for trial, settings in leading.items()
    }
    run_all([repeat for some in repeats.values() for repeat in some])
    scores = {trial: noise.read_scores(some, "val") for trial, some in repeats.items()}
    best = noise.pick(scores)
    name, preset = next(iter(prepared.presets.items()))
    first = seed + noise.CONFIRM_SEEDS
    found: dict[str, Any] = {
        "best": best,
        "repeats": [{"trial": trial, "scores": some, **(mean_ci(some) or {})} for trial, some in scores.items()],
    }
    sides = {
        "best": noise.repeats_of(f"trial-{best:06d}", leading[best], folder / "confirm", first, count),
        "preset": noise.repeats_of("preset", preset, folder / "confirm", first, count),
    }
    run_all([*sides["best"], *sides["preset"]])
    ours, theirs = (noise.read_scores(sides[side], "test") for side in ("best", "preset"))
    about = {"name": name, "seeds": [repeat.settings.config.seed for repeat in sides["best"]]}
    return {**found, "confirmation": {**about, **noise.comparison(ours, theirs)}}


def task_runs(ask: Ask, prepared: Prepared, tell: Tell) -> noise.RunAll:
    """Makes runs as `fst compile` would, some at a time."""
    from fst_optimizer.lab.launch import run_all
    from fst_optimizer.lab.plan import Common, Job

    def run(repeats: Sequence[noise.Repeat]) -> None:
        jobs = []
        for repeat in repeats:
            path = repeat.folder.parent / f"{repeat.label}.json"
            write_json(path, settings_json(repeat.settings))
            config, choices = repeat.settings.config, ask.choices
            method = f"{config.method}@{choices.engine}" if choices.engine else config.method
            sets = tuple(pair for pair in choices.sets if pair.startswith("vllm."))
            common = Common(prepared.plan.cap, sets, choices.model, choices.sizes, path)
            jobs.append(Job(choices.task, method, config.seed, repeat.folder, common))
        run_all(jobs, at_once=ask.workers, tell=tell)

    return run
