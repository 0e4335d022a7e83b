"""`fst_optimizer.tune`: the study of a program of one's own, in this process."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings, base_config
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.run import FSTConfig, preset
from fst_optimizer.errors import EngineError, UserError
from fst_optimizer.store.files import RunFiles
from fst_optimizer.tuning import noise, output
from fst_optimizer.tuning.ask import (
    PRESETS,
    Prepared,
    capped,
    check_budget,
    check_numbers,
    need_tune,
    preset_name,
)
from fst_optimizer.tuning.confirm import confirmed
from fst_optimizer.tuning.objectives import parse_objectives
from fst_optimizer.tuning.pruning import check_pruner
from fst_optimizer.tuning.samplers import check_sampler
from fst_optimizer.tuning.space import Space, default_space, largest_rank
from fst_optimizer.tuning.space_check import check_space
from fst_optimizer.tuning.standing import Limits
from fst_optimizer.tuning.storage import HEARTBEAT_S, open_storage
from fst_optimizer.tuning.study import Plan, check_folder, open_study, study_name
from fst_optimizer.tuning.work import Desk, Work
from fst_optimizer.tuning.worker import Manner, work_on

if TYPE_CHECKING:
    import dspy
    from optuna import Study

    from fst_optimizer.policy.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneResult:
    """What a study came to."""

    folder: Path
    """Has `best.json`, `tune.json`, `report.md`, `plots/` and `trials/`."""
    summary: Mapping[str, Any]
    """The content of `tune.json`: trials, importances, what pruning saved, repeats and confirmation."""
    best_trial: int | None
    """Its number. None: no trial is complete."""
    best_config: FSTConfig | None
    """For `FST(config=...)`."""
    best_lora: LoraConfig | None
    """For `Policy(lora=...)`, or `policy.start_over(...)`."""
    ended: str
    """`done`, `budget`, or `elsewhere`: other workers have the trials that are missing."""
    study: Study
    """Optuna's."""

    @property
    def best_score(self) -> float | None:
        """The best trial's score on the validation set, in the study."""
        rows = {row["trial"]: row for row in self.summary["trials"]}
        return None if self.best_trial is None else rows[self.best_trial]["score"]

    @property
    def pareto(self) -> list[Mapping[str, Any]]:
        """With several objectives, the trials that none is better than in everything."""
        return [row for row in self.summary["trials"] if row["trial"] in self.summary["pareto"]]


def tune(
    program: dspy.Module,
    metric: Callable[..., Any],
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None = None,
    *,
    trials: int,
    space: Space | None = None,
    auto: str = "light",
    config: FSTConfig | Mapping[str, Any] | None = None,
    testset: Sequence[dspy.Example] | None = None,
    reflection_lm: dspy.LM | None = None,
    study: str | None = None,
    storage: str | None = None,
    folder: str | Path | None = None,
    sampler: str = "tpe",
    pruner: str = "hyperband",
    objectives: str | Sequence[str] = "score",
    budget_rollouts: int | None = None,
    repeats: int = 0,
    heartbeat_s: int = HEARTBEAT_S,
) -> TuneResult:
    """Search for the settings with which FST does best on a program.

    Every trial starts from the base of the program's policy, which is at its base again afterwards; `program` is not
    changed. The same call with more `trials` goes on with the study. Several processes may make the same call at once,
    with one `storage`: they share the trials.

    Args:
        program: Its predictors use one policy's `lm`.
        metric: As for `FST`.
        trainset: Examples to learn from.
        valset: Examples that a trial is scored on. None: a seeded fifth of `trainset` is held out.
        trials: Finished trials, complete or pruned, that the study shall have in total.
        space: Where settings come from, see `fst_optimizer.tuning.space`. None: the default one.
        auto: The preset under all trials; ignored when `config` is given.
        config: What all trials share. Its `budget.max_rollouts`, or what it would spend without, caps each of them.
        testset: What the winner is confirmed on. Needed for `repeats`.
        reflection_lm: As for `FST`.
        study: Its name. None: from the program's class and the seed.
        storage: A database's URL. None: SQLite in the folder.
        folder: Where everything goes. None: `runs/tune-STUDY`.
        sampler: `tpe`, `random`, `qmc`, `gp`, `cmaes`, `nsgaii`, `nsgaiii` or `brute_force`.
        pruner: `hyperband`, `median`, `wilcoxon` or `none`.
        objectives: `score`, or score and some of `rollouts`, `dollars`, `seconds`, `kl_to_base`: then nothing is
            pruned.
        budget_rollouts: Most training rollouts of all trials together. None: no cap.
        repeats: More seeds for the leading configurations, and for the winner beside the preset on `testset`.
        heartbeat_s: Seconds between two signs of life in the storage.

    Raises:
        UserError: something is wrong with what was passed in, or the study is another one; no trial was begun.
        StudyStopped: three trials in a row failed of one cause.
    """
    need_tune()
    from fst_optimizer.program.lms import attach_policy
    from fst_optimizer.program.student import checked_student

    policy, version = checked_student(program)
    if version:
        raise UserError(
            f"the program's LM is at policy version {version}: trials start from the base; use a new Policy"
        )
    names = parse_objectives(objectives)
    check_numbers(trials, budget=budget_rollouts, repeats=repeats)
    check_sampler(sampler, len(names))
    check_pruner(pruner)
    if repeats and not testset:
        raise UserError(f"repeats is {repeats} and testset is empty: the winner is confirmed on examples of its own")
    own = _config(config, auto)
    base, cap = capped(_settings(own, policy))
    space = default_space() if space is None else space
    check_space(space, base)
    check_budget(budget_rollouts, cap)
    label = type(program).__name__
    presets = {preset_name(config is not None, None if config is not None else auto): base}
    given = None if config is None else own
    presets |= {f"preset {name}": capped(_settings(base_config(given, name), policy), cap)[0] for name in PRESETS}
    plan = Plan(label, base, space, names, cap, _data(trainset, valset, own.seed), policy.name)
    prepared = Prepared(plan, presets, Limits(trials, cap, budget_rollouts))

    name = study or study_name(label, own.seed)
    root = Path(folder) if folder else Path("runs") / f"tune-{name}"
    root.mkdir(parents=True, exist_ok=True)
    found, fresh = open_study(
        open_storage(storage or f"sqlite:///{root / 'study.db'}", heartbeat_s), name, plan, presets
    )
    check_folder(root, fresh)
    work = Work(
        name=label,
        program=lambda: attach_policy(program, policy),
        metric=metric,
        trainset=trainset,
        valset=valset,
        make_policy=lambda _: policy,
        temporary_adapter=True,
        reflection_lm=reflection_lm,
    )
    try:
        ended = work_on(found, plan, work, root, prepared.limits, Manner(sampler, pruner))
        summary = output.summarized(found, plan)
        if repeats and summary["best"] is not None:
            assert testset is not None
            summary |= confirmed(summary, prepared, root, repeats, _runs(work, plan, testset))
    finally:
        with suppress(EngineError):  # where the engine is dead, that has been said
            policy.start_over(base.lora, seed=base.config.seed)
    output.write_outputs(found, plan, summary, root)
    best = summary["best"]
    settings = None if best is None else output.settings_of(summary, plan, best)
    return TuneResult(
        folder=root,
        summary=summary,
        best_trial=best,
        best_config=settings.config if settings else None,
        best_lora=settings.lora if settings else None,
        ended=ended,
        study=found,
    )


def _config(config: FSTConfig | Mapping[str, Any] | None, auto: str) -> FSTConfig:
    if config is None:
        return preset(auto)
    return config if isinstance(config, FSTConfig) else FSTConfig.from_dict(config)


def _settings(config: FSTConfig, policy: Policy) -> Settings:
    return Settings(config, policy.lora, PolicyConfig(max_tokens=policy.max_tokens))


def _data(trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, seed: int) -> dict[str, Any]:
    from fst_optimizer.data import split_data
    from fst_optimizer.run.record import digest

    train, val = split_data(trainset, valset, seed)
    return {"train": digest(train), "val": digest(val)}


def _runs(work: Work, plan: Plan, testset: Sequence[dspy.Example]) -> noise.RunAll:
    """Makes runs one after the other; one that was interrupted is begun again."""

    def run(repeats: Sequence[noise.Repeat]) -> None:
        desk = Desk(work, largest_rank(plan.space, plan.settings))
        for repeat in repeats:
            if not RunFiles(repeat.folder).result.exists():
                shutil.rmtree(repeat.folder, ignore_errors=True)
                desk.run(repeat.settings, repeat.folder, testset=testset)
                logger.info("%s, seed %d, is done", repeat.label, repeat.settings.config.seed)

    return run
