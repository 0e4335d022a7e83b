"""A worker: runs trials of a study, one after the other, until the study has enough."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer import task_run
from fst_optimizer.errors import FSTError
from fst_optimizer.store.files import read_json
from fst_optimizer.task_run import Choices, Sizes
from fst_optimizer.tuning import standing
from fst_optimizer.tuning.grid import grid_points
from fst_optimizer.tuning.pruning import make_pruner
from fst_optimizer.tuning.samplers import make_sampler
from fst_optimizer.tuning.space import largest_rank
from fst_optimizer.tuning.standing import Limits
from fst_optimizer.tuning.storage import has_heartbeat, open_storage, quiet_optuna, try_again
from fst_optimizer.tuning.study import Plan, plan_of, trial_folder
from fst_optimizer.tuning.trial import run_trial
from fst_optimizer.tuning.work import Desk, Work

if TYPE_CHECKING:
    from optuna import Study, Trial

    from fst_optimizer.config.policy import LoraConfig
    from fst_optimizer.policy.policy import Policy

logger = logging.getLogger(__name__)
POLL_S = 1.0
STORAGE_VARIABLE = "FST_TUNE_STORAGE"
COMMAND = "command.json"


class StudyStopped(FSTError):
    """The same failure came too often in a row; what is finished stands."""


class Surplus(Exception):
    """A trial was given out that the study has no room for."""


@dataclass(frozen=True)
class Manner:
    """How a worker goes about it."""

    sampler: str = "tpe"
    pruner: str = "hyperband"
    number: int = 0
    """Of this worker; its random numbers follow from it."""
    poll_s: float = POLL_S


def work_on(
    study: Study,
    plan: Plan,
    work: Work,
    folder: Path,
    limits: Limits,
    manner: Manner,
    on_trial: Callable[[Study], None] | None = None,
) -> str:
    """Run trials until the study has enough; why it has: `done`, `budget`, or `elsewhere`, where others run the rest.

    Args:
        study: Loaded from its storage.
        plan: What it is for.
        work: Program, metric, data and policy.
        folder: Its `trials/` gets the run directories.
        limits: When it is enough.
        manner: Sampler, pruner and so on.
        on_trial: Called after each trial.

    Raises:
        StudyStopped: three trials in a row failed of one cause.
        KeyboardInterrupt: the trial under way is put back in the queue.
    """
    import optuna

    desk = Desk(work, largest_rank(plan.space, plan.settings))
    points = grid_points(plan.cap)
    with quiet_optuna():
        before = study.get_trials(deepcopy=False)
        study.sampler = make_sampler(manner.sampler, plan.settings.config.seed, manner.number, len(before))
        study.pruner = make_pruner(manner.pruner, len(points), plan.objectives)
        ended_before = {trial.number for trial in before if trial.state.is_finished()}

        def objective(trial: Trial) -> list[float]:
            _wait_for_room(study, trial, limits, manner.poll_s)
            return run_trial(
                trial,
                desk,
                plan.settings,
                plan.space,
                trial_folder(folder, trial.number),
                points=points,
                objectives=plan.objectives,
                pruner=manner.pruner,
            )

        try:
            while True:
                optuna.storages.fail_stale_trials(study)
                trials = standing.seen(study.get_trials(deepcopy=False))
                cause = standing.repeated_failure(trials, ended_before)
                if cause:
                    raise StudyStopped(_stop_text(study, cause))
                may = standing.room(trials, limits)
                if may in ("done", "budget"):
                    return may
                if may == "wait":
                    if not has_heartbeat(study):
                        return "elsewhere"  # nobody would ever tell that those that run are dead
                    time.sleep(manner.poll_s)
                    continue
                _one_trial(study, objective)
                if on_trial:
                    on_trial(study)
        finally:
            desk.clear()


def _one_trial(study: Study, objective: Callable[[Trial], list[float]]) -> None:
    """Ask for a trial, run it and tell what came of it."""
    mine: list[Trial] = []

    def noted(trial: Trial) -> list[float]:
        mine.append(trial)
        return objective(trial)

    try:
        study.optimize(noted, n_trials=1, catch=(Exception,), gc_after_trial=True)
    except KeyboardInterrupt:
        _back_in_the_queue(study, mine)
        raise
    except ValueError as error:
        # Optuna refuses to finish a trial that another worker has declared dead, and given out again.
        if not mine or not _ended(study, mine[0]):
            raise
        logger.warning("trial %d was taken for dead by another worker: %s", mine[0].number, error)
        return
    if mine and _state(study, mine[0]).user_attrs.get("cause") == "surplus":
        _back_in_the_queue(study, mine)


def _wait_for_room(study: Study, trial: Trial, limits: Limits, poll_s: float) -> None:
    """Return when the trial may run.

    Raises:
        Surplus: the study has enough without it.
    """
    while True:
        may = standing.room(standing.seen(study.get_trials(deepcopy=False)), limits, before=trial.number)
        if may == "start":
            return
        if may in ("done", "budget") or not has_heartbeat(study):
            trial.set_user_attr("cause", "surplus")
            raise Surplus
        time.sleep(poll_s)


def _back_in_the_queue(study: Study, mine: list[Trial]) -> None:
    """A trial that was not allowed to end is run by whoever goes on with the study."""
    for trial in mine:
        frozen = _state(study, trial)
        if frozen.params or "fixed_params" in frozen.system_attrs:
            try_again(study, frozen)


def _state(study: Study, trial: Trial) -> Any:
    return study._storage.get_trial(trial._trial_id)


def _ended(study: Study, trial: Trial) -> bool:
    return bool(_state(study, trial).state.is_finished())


def _stop_text(study: Study, cause: str) -> str:
    failed = [trial for trial in study.get_trials(deepcopy=False) if standing.cause_of(trial) == cause]
    last = failed[-1].user_attrs if failed else {}
    return (
        f"{standing.IN_A_ROW} trials in a row failed of the same cause, {cause}: "
        f"{last.get('error', 'nothing was written')}. See {last.get('run', 'the trials')}; mend it, and the same "
        "command goes on"
    )


# -- in a process of its own -------------------------------------------------------------------------------------


def run_worker(folder: Path, number: int) -> None:
    """What a worker process does."""
    import optuna

    data = read_json(folder / COMMAND)
    choices = _choices(data["choices"])
    storage = open_storage(os.environ[STORAGE_VARIABLE], data["heartbeat_s"])
    with quiet_optuna():
        study = optuna.load_study(study_name=data["study"], storage=storage)
    plan = plan_of(study)
    limits = Limits(data["trials"], plan.cap, data["budget_rollouts"])
    manner = Manner(data["sampler"], data["pruner"], number)
    parent = os.getppid()

    def go_on(_: Study) -> None:
        if os.getppid() != parent:
            raise KeyboardInterrupt  # the command that started this was killed

    work_on(study, plan, task_work(choices, number), folder, limits, manner, go_on)


def _choices(data: Mapping[str, Any]) -> Choices:
    paths = {name: None if data[name] is None else Path(data[name]) for name in ("run_dir", "config_file")}
    return Choices(**{**data, **paths, "sizes": Sizes(**data["sizes"]), "sets": tuple(data["sets"])})


def task_work(choices: Choices, number: int = 0) -> Work:
    """A task as the work of a study."""
    plan = task_run.plan_run(choices)
    own = replace(choices, run_dir=choices.run_dir / f"worker-{number}")

    def policy(lora: LoraConfig) -> Policy:
        if choices.engine == "vllm":  # its server writes a log there
            own.run_dir.mkdir(parents=True, exist_ok=True)
        return task_run.make_policy(own, replace(plan, settings=replace(plan.settings, lora=lora)))

    return Work(
        choices.task,
        plan.task.build_program,
        plan.task.metric,
        plan.task.load("train", choices.sizes.train),
        plan.task.load("val", choices.sizes.val),
        policy,
    )
