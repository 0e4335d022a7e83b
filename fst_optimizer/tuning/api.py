"""`fst_optimizer.tune`: the study of a program of one's own, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.arguments import check_path
from fst_optimizer.config.overrides import Settings, base_config
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import check_examples, listed
from fst_optimizer.errors import EngineError, UserError
from fst_optimizer.evolve.reflection_lm import check_lm, name_of
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.student import checked_student
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.tuning.confirm import confirm_winner, repeats_here
from fst_optimizer.tuning.request import join_study, make_request, plan_study, presets_of
from fst_optimizer.tuning.runner import TrialRunner
from fst_optimizer.tuning.space import Space
from fst_optimizer.tuning.storage import HEARTBEAT_S
from fst_optimizer.tuning.summary import finish_study
from fst_optimizer.tuning.worker import run_trials

if TYPE_CHECKING:
    import dspy
    from optuna import Study

    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.tuning.request import TuneRequest


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

    - `program`, `metric`, `reflection_lm`: as for `FST`; the predictors use one policy's `lm`.
    - `trainset`, `valset`: what trials learn from, and what they are scored on. None: a seeded fifth is held out.
    - `auto`: the preset under all trials.
    - `config`: what all trials share, over the preset. Its `budget.max_rollouts`, or what it would spend without, caps
      each of them.
    - `testset`: what the winner is confirmed on. Needed for `repeats`.
    - The others are fields of `TuneRequest`. None for `study` and `folder`: from the program's class and the seed.

    Raises:
        UserError: something is wrong with what was passed in, or the study is another one; no trial was begun.
        StudyStopped: three trials in a row failed of one cause.
    """
    check_lm(reflection_lm)
    Metric(metric)
    check_examples(trainset, valset)
    preset(auto)
    if testset is not None:
        listed(testset, "testset")
    if folder is not None:
        check_path("folder", folder)
    if study is not None:
        check_path("study", study)
    policy, name = _base_policy(program), type(program).__name__
    own = config if config is None or isinstance(config, FSTConfig) else FSTConfig.from_dict(config)
    search = {"sampler": sampler, "pruner": pruner, "objectives": objectives}
    amount = {"trials": trials, "budget_rollouts": budget_rollouts, "repeats": repeats}
    where = {"storage": storage, "heartbeat_s": heartbeat_s}
    request = make_request(name, own.seed if own else 0, study, folder, space, {**search, **amount, **where})
    build = partial(attach_policy, program, policy)
    runner = TrialRunner(name, build, metric, trainset, valset, lambda _: policy, owns_policy=False)
    runner.reflection_lm = lambda _: reflection_lm
    return _search(request, runner, policy, own, auto, testset)


def _base_policy(program: dspy.Module) -> Policy:
    policy, version = checked_student(program)
    if version or policy.version:
        raise UserError(
            f"the program's LM is at policy version {version} and its Policy at {policy.version}: trials start from "
            "the base; use a new Policy"
        )
    return policy


def _search(
    request: TuneRequest,
    runner: TrialRunner,
    policy: Policy,
    own: FSTConfig | None,
    preset: str,
    testset: Sequence[dspy.Example] | None,
) -> TuneResult:
    def settings_of(auto: str | None) -> Settings:
        return Settings(base_config(own, auto or preset), policy.lora, PolicyConfig(max_tokens=policy.max_tokens))

    if request.repeats and not testset:
        raise UserError(
            f"repeats is {request.repeats} and testset is empty: the winner is confirmed on examples of its own"
        )
    presets = presets_of(own is not None, preset if own is None else None, settings_of)
    reflection_lm = name_of(runner.reflection_lm(policy), policy)
    plan = plan_study(request, runner.name, presets, runner.trainset, runner.valset, policy.name, reflection_lm)
    study = join_study(request, plan)
    confirm = None
    if testset and request.repeats:
        confirm = partial(confirm_winner, plan=plan, request=request, run_repeats=repeats_here(runner, testset))
    try:
        ended = run_trials(study, plan, request, runner)
        summary = finish_study(study, plan, request.folder, confirm)
    finally:
        with suppress(EngineError):  # where the engine is dead, that has been said
            policy.start_over(plan.settings.lora, seed=plan.settings.config.seed)
    row = next((row for row in summary["trials"] if row["trial"] == summary["best"]), None)
    settings = plan.settings_of(row["params"]) if row else None
    return TuneResult(
        folder=request.folder,
        summary=summary,
        best_trial=summary["best"],
        best_config=settings.config.complete() if settings else None,
        best_lora=settings.lora if settings else None,
        ended=ended,
        study=study,
    )
