"""`fst_optimizer.tune`: the study of a program of one's own, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings, base_config
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import EngineError, UserError
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.student import checked_student
from fst_optimizer.tuning.confirm import confirm_winner, repeats_here
from fst_optimizer.tuning.request import join_study, make_request, plan_study, presets_of
from fst_optimizer.tuning.runner import TrialRunner
from fst_optimizer.tuning.space import Space, default_space, largest_rank
from fst_optimizer.tuning.storage import HEARTBEAT_S
from fst_optimizer.tuning.summary import finish_study
from fst_optimizer.tuning.worker import run_trials

if TYPE_CHECKING:
    import dspy
    from optuna import Study


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
    policy, version = checked_student(program)
    if version:
        raise UserError(
            f"the program's LM is at policy version {version}: trials start from the base; use a new Policy"
        )
    own = FSTConfig.from_dict(config) if isinstance(config, Mapping) else config

    def settings_of(auto: str | None) -> Settings:
        return Settings(base_config(own, auto), policy.lora, PolicyConfig(max_tokens=policy.max_tokens))

    label = type(program).__name__
    presets = presets_of(own is not None, auto if own is None else None, settings_of)
    base, *_ = presets.values()
    request = make_request(
        label,
        base.config.seed,
        study=study,
        folder=folder,
        trials=trials,
        space=default_space() if space is None else space,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        objectives=objectives,
        budget_rollouts=budget_rollouts,
        repeats=repeats,
        heartbeat_s=heartbeat_s,
    )
    if repeats and not testset:
        raise UserError(f"repeats is {repeats} and testset is empty: the winner is confirmed on examples of its own")
    plan = plan_study(request, label, presets, trainset, valset, policy.name)
    found = join_study(request, plan)
    runner = TrialRunner(
        name=label,
        build_program=lambda: attach_policy(program, policy),
        metric=metric,
        trainset=trainset,
        valset=valset,
        make_policy=lambda _: policy,
        max_rank=largest_rank(plan.space, plan.settings),
        owns_policy=False,
        reflection_lm=reflection_lm,
    )
    confirm = None
    if testset and repeats:
        run_repeats = repeats_here(runner, testset)
        confirm = partial(confirm_winner, plan=plan, folder=request.folder, count=repeats, run_repeats=run_repeats)
    try:
        ended = run_trials(found, plan, request, runner)
        summary = finish_study(found, plan, request.folder, confirm)
    finally:
        with suppress(EngineError):  # where the engine is dead, that has been said
            policy.start_over(plan.settings.lora, seed=plan.settings.config.seed)
    best = summary["best"]
    params = next((row["params"] for row in summary["trials"] if row["trial"] == best), None)
    settings = None if params is None else plan.settings_of(params)
    return TuneResult(
        folder=request.folder,
        summary=summary,
        best_trial=best,
        best_config=settings.config if settings else None,
        best_lora=settings.lora if settings else None,
        ended=ended,
        study=found,
    )
