"""A worker: runs trials of a study, one after the other, until the study has enough."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from fst_optimizer import task_run
from fst_optimizer.errors import FSTError
from fst_optimizer.store.files import read_json, write_json
from fst_optimizer.tuning.admission import IN_A_ROW, SURPLUS, Limits, admission, cause_of, repeated_failure
from fst_optimizer.tuning.pruning import POINTS, make_pruner
from fst_optimizer.tuning.request import TuneRequest
from fst_optimizer.tuning.runner import TrialRunner
from fst_optimizer.tuning.samplers import make_sampler
from fst_optimizer.tuning.space import largest_rank
from fst_optimizer.tuning.storage import has_heartbeat, open_storage, quiet_optuna, try_again
from fst_optimizer.tuning.study import StudyPlan, plan_of, trial_folder
from fst_optimizer.tuning.trial import run_trial

if TYPE_CHECKING:
    from fst_optimizer.config.policy import LoraConfig
    from fst_optimizer.policy.policy import Policy

logger = logging.getLogger(__name__)
POLL_S = 1.0
COMMAND = "command.json"
STORAGE_VARIABLE = "FST_TUNE_STORAGE"


class StudyStopped(FSTError):
    """The same failure came too often in a row; what is finished stands."""


class SurplusTrial(Exception):
    """A worker was given a trial that the study has no place for."""


def run_trials(
    study: optuna.Study,
    plan: StudyPlan,
    request: TuneRequest,
    runner: TrialRunner,
    number: int = 0,
    on_trial: Callable[[], None] | None = None,
) -> str:
    """Run trials until the study has enough; why it has: `done`, `budget`, or `elsewhere`, where others run the rest.

    `number` is the worker's: its random numbers follow from it. `on_trial` is called after each trial.

    Raises:
        StudyStopped: three trials in a row failed of one cause.
        KeyboardInterrupt: the trial under way is put back in the queue.
    """
    limits = request.limits(plan)

    def objective(trial: optuna.Trial) -> list[float]:
        _wait_for_place(study, trial, limits, request)
        return run_trial(trial, runner, plan, trial_folder(request.folder, trial.number), request.pruner)

    with quiet_optuna():
        before = study.get_trials(deepcopy=False)
        study.sampler = make_sampler(request.sampler, plan.settings.config.seed, number, len(before))
        study.pruner = make_pruner(request.pruner, POINTS, plan.objectives)
        ended_before = {trial.number for trial in before if trial.state.is_finished()}
        try:
            while True:
                optuna.storages.fail_stale_trials(study)
                trials = study.get_trials(deepcopy=False)
                if cause := repeated_failure(trials, ended_before):
                    last = [trial.user_attrs for trial in trials if cause_of(trial) == cause][-1]
                    raise StudyStopped(
                        f"{IN_A_ROW} trials in a row failed of the same cause, {cause}: "
                        f"{last.get('error', 'no error was recorded')}. See {last.get('run', 'the trials')}; mend it, "
                        "and the same command goes on"
                    )
                match admission(trials, limits):
                    case "start":
                        _run_one(study, objective)
                        if on_trial:
                            on_trial()
                    case "wait" if has_heartbeat(request.url):
                        time.sleep(POLL_S)
                    case "wait":
                        return "elsewhere"  # it would never be noticed that those that run are dead
                    case ended:
                        return ended
        finally:
            runner.close()


def _run_one(study: optuna.Study, objective: Callable[[optuna.Trial], list[float]]) -> None:
    """Ask Optuna for a trial, run it and record its outcome."""
    given: list[int] = []

    def noted(trial: optuna.Trial) -> list[float]:
        given.append(trial.number)
        return objective(trial)

    def requeue_surplus(_: optuna.Study, trial: FrozenTrial) -> None:
        if trial.user_attrs.get("cause") == SURPLUS:
            _requeue(study, trial)

    try:
        study.optimize(noted, n_trials=1, catch=(Exception,), callbacks=[requeue_surplus], gc_after_trial=True)
    except KeyboardInterrupt:
        for trial in study.get_trials(deepcopy=False):
            if trial.number in given:
                _requeue(study, trial)
        raise
    except ValueError as error:
        # Optuna refuses to finish a trial that another worker has declared dead and queued again.
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if not any(trial.number in given for trial in failed):
            raise
        logger.warning("trial %d was taken for dead by another worker: %s", given[0], error)


def _wait_for_place(study: optuna.Study, trial: optuna.Trial, limits: Limits, request: TuneRequest) -> None:
    """Return when the trial may run.

    Raises:
        SurplusTrial: the study has enough without it.
    """
    while (found := admission(study.get_trials(deepcopy=False), limits, before=trial.number)) != "start":
        if found != "wait" or not has_heartbeat(request.url):
            trial.set_user_attr("cause", SURPLUS)
            raise SurplusTrial
        time.sleep(POLL_S)


def _requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Leave a trial that was not allowed to end to whoever goes on; one without parameters has nothing to keep."""
    if trial.params or "fixed_params" in trial.system_attrs:
        try_again(study, trial)


# -- in a process of its own ------------------------------------------------------------------------------------------


def write_command(request: TuneRequest, choices: task_run.RunRequest) -> None:
    """What the workers read. The storage's URL is left out: it may have a password in it."""
    command = {"request": request.changed(storage=None).to_dict(), "choices": asdict(choices)}
    write_json(request.folder / COMMAND, TypeAdapter(dict).dump_python(command, mode="json"))


def run_worker(folder: Path, number: int) -> None:
    """What a worker process does, as `fst tune` wrote it into the study's folder."""
    data = read_json(folder / COMMAND)
    request = TuneRequest(**{**data["request"], "storage": os.environ[STORAGE_VARIABLE]})
    choices = TypeAdapter(task_run.RunRequest).validate_python(data["choices"])
    with quiet_optuna():
        study = optuna.load_study(study_name=request.study, storage=open_storage(request.url, request.heartbeat_s))
    plan = plan_of(study)
    parent = os.getppid()

    def check_parent() -> None:
        if os.getppid() != parent:
            raise KeyboardInterrupt  # the command that started this was killed

    run_trials(study, plan, request, task_runner(choices, plan, folder / f"worker-{number}"), number, check_parent)


def task_runner(choices: task_run.RunRequest, plan: StudyPlan, folder: Path) -> TrialRunner:
    """Runs a task; the folder is for the log of a server, which is started for the largest rank of the space."""
    run_plan = task_run.plan_run(choices)
    task = run_plan.task

    def make_policy(lora: LoraConfig) -> Policy:
        if choices.engine == "vllm":
            folder.mkdir(parents=True, exist_ok=True)
        lora = lora.changed(rank=max(lora.rank, largest_rank(plan.space, plan.settings)))
        settings = replace(run_plan.settings, lora=lora)
        return task_run.make_policy(replace(choices, run_dir=folder), replace(run_plan, settings=settings))

    return TrialRunner(
        choices.task,
        task.build_program,
        task.metric,
        task.load("train", choices.sizes.train),
        task.load("val", choices.sizes.val),
        make_policy,
        task_run.reflection_lm_of(choices, run_plan),
    )
