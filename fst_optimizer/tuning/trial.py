"""One trial: settings drawn, FST run in a directory of its own, and its outcome recorded in the study."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from fst_optimizer.store.files import RunFiles, read_json, write_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.text import plain
from fst_optimizer.tuning.admission import INTERRUPTED
from fst_optimizer.tuning.callback import PruningCallback
from fst_optimizer.tuning.objectives import objective_values
from fst_optimizer.tuning.pruning import grid_points
from fst_optimizer.tuning.runner import TrialRunner, failure_cause
from fst_optimizer.tuning.space import suggest, with_values

if TYPE_CHECKING:
    from fst_optimizer.tuning.study import StudyPlan

logger = logging.getLogger(__name__)
ERROR_LENGTH = 500
"""Characters of an error's text that the study keeps."""


def run_trial(trial: optuna.Trial, runner: TrialRunner, plan: StudyPlan, folder: Path, pruner: str) -> list[float]:
    """Run one trial in its run directory and return its objectives.

    Raises:
        optuna.TrialPruned: it was pruned; its directory has a result all the same.
        Exception: it failed; the cause is among the trial's user attributes.
    """
    trial.set_user_attr("run", str(folder))
    trial.set_user_attr("host", platform.node())
    points, files = grid_points(plan.cap), RunFiles(folder)
    callback = PruningCallback(trial, points, len(plan.objectives) == 1, pruner == "wilcoxon")
    try:
        settings = with_values(plan.settings, suggest(trial, plan.space, plan.settings))
        result = dict(runner.run(settings, folder, (callback,)).result)
        pruned = callback.pruned_at is not None
        about = {"study": trial.study.study_name, "trial": trial.number, "pruned": pruned}
        write_json(files.result, {**read_json(files.result), **about})
        if not pruned:
            callback.ended()
            values = objective_values(plan.objectives, result, read_metrics(files.metrics))
    except (Exception, KeyboardInterrupt) as error:
        _record_failure(trial, folder, error)
        raise
    trial.set_user_attr("seconds", result["wall_s"])
    trial.set_user_attr("best", result["val_score_after"])
    logger.info("trial %d: best score %.3f", trial.number, result["val_score_after"])
    if callback.pruned_at is not None:
        text = f"{trial.user_attrs.get('score', 0):.3f} at {points[callback.pruned_at - 1]} rollouts ({pruner})"
        trial.set_user_attr("pruned", text)
        raise optuna.TrialPruned(text)
    return values


def _record_failure(trial: optuna.Trial, folder: Path, error: BaseException) -> None:
    """The cause of a failure, in the study and beside the run's other files."""
    interrupted = isinstance(error, KeyboardInterrupt)
    cause = INTERRUPTED if interrupted else failure_cause(error)
    text = plain(f"{type(error).__name__}: {error}")[:ERROR_LENGTH]
    if not interrupted:
        logger.warning("trial %d failed (%s): %s", trial.number, cause, text)
    try:
        trial.set_user_attr("cause", cause)
        trial.set_user_attr("error", text)
    except optuna.exceptions.UpdateFinishedTrialError:  # it missed its signs of life, and was given to another worker
        cause, text = "given up", "another worker took this one for dead"
    if folder.is_dir():
        about = {"trial": trial.number, "study": trial.study.study_name, "cause": cause, "error": text}
        write_json(folder / "failure.json", about)
