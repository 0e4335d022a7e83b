"""One trial: settings drawn, FST run in a directory of its own, and what came of it told to the study."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.store.files import RunFiles, read_json, write_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.text import plain
from fst_optimizer.tuning.objectives import objective_values
from fst_optimizer.tuning.pruning import SCORES
from fst_optimizer.tuning.space import Space, suggest, with_values
from fst_optimizer.tuning.watch import Watcher
from fst_optimizer.tuning.work import Desk, failure_cause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.trial import Trial

logger = logging.getLogger(__name__)
ERROR_LENGTH = 500
"""Characters of an error's text that the study keeps."""


class Told:
    """Passes what a trial does on to Optuna.

    Args:
        trial: Optuna's.
        prunes: Whether its pruner is asked; a study with several objectives has none.
        by_example: Whether scores by example are kept, for a pruner that compares them.
    """

    def __init__(self, trial: Trial, *, prunes: bool, by_example: bool) -> None:
        self.trial = trial
        self.prunes = prunes
        self.by_example = by_example
        self._scores: dict[str, Mapping[str, float]] = {}

    def told(self, rollouts: int, score: float | None) -> None:
        """See `Listener.told`."""
        self.trial.set_user_attr("rollouts", rollouts)
        if score is not None:
            self.trial.set_user_attr("score", score)

    def reached(self, step: int, score: float, scores: Mapping[str, float]) -> bool:
        """See `Listener.reached`."""
        if not self.prunes:
            return False
        if self.by_example:
            self._scores[str(step)] = scores
            self.trial.set_user_attr(SCORES, self._scores)
        self.trial.report(score, step)
        return bool(self.trial.should_prune())


def run_trial(
    trial: Trial,
    desk: Desk,
    base: Settings,
    space: Space,
    folder: Path,
    *,
    points: Sequence[int],
    objectives: Sequence[str],
    pruner: str,
) -> list[float]:
    """Run one trial and return its objectives.

    Args:
        trial: Optuna's.
        desk: The worker's.
        base: The settings that all trials share.
        space: Where the others come from.
        folder: The trial's run directory.
        points: The grid on which it may be pruned.
        objectives: What to return.
        pruner: Its name.

    Raises:
        optuna.TrialPruned: it was given up; its directory has a result all the same.
        Exception: it failed; the cause is among the trial's user attributes.
    """
    import optuna

    trial.set_user_attr("run", str(folder))
    trial.set_user_attr("host", platform.node())
    told = Told(trial, prunes=len(objectives) == 1, by_example=pruner == "wilcoxon")
    watcher = Watcher(points, told)
    try:
        settings = with_values(base, suggest(trial, space, base))
        result = dict(desk.run(settings, folder, (watcher,)).result)
        _number_result(folder, trial, watcher.pruned_at)
        lines = read_metrics(RunFiles(folder).metrics)
        if watcher.pruned_at is None:
            watcher.ended()
            values = objective_values(objectives, result, lines)
    except (Exception, KeyboardInterrupt) as error:
        write_failure(trial, folder, error)
        raise
    trial.set_user_attr("seconds", result["wall_s"])
    trial.set_user_attr("best", result["val_score_after"])
    logger.info("trial %d: best score %.3f", trial.number, result["val_score_after"])
    if watcher.pruned_at is not None:
        text = f"{trial.user_attrs.get('score', 0):.3f} at {points[watcher.pruned_at - 1]} rollouts ({pruner})"
        trial.set_user_attr("pruned", text)
        raise optuna.TrialPruned(text)
    return values


def write_failure(trial: Trial, folder: Path, error: BaseException) -> None:
    """The cause of a failure, in the study and beside the run's other files."""
    from optuna.exceptions import UpdateFinishedTrialError

    cause = "interrupted" if isinstance(error, KeyboardInterrupt) else failure_cause(error)
    text = plain(f"{type(error).__name__}: {error}")[:ERROR_LENGTH]
    if not isinstance(error, KeyboardInterrupt):
        logger.warning("trial %d failed (%s): %s", trial.number, cause, text)
    try:
        trial.set_user_attr("cause", cause)
        trial.set_user_attr("error", text)
    except UpdateFinishedTrialError:  # taken for dead, and given to another worker
        cause, text = "given up", "another worker took this one for dead"
    if folder.is_dir():
        about = {"trial": trial.number, "study": trial.study.study_name, "cause": cause, "error": text}
        write_json(folder / "failure.json", about)


def _number_result(folder: Path, trial: Trial, pruned_at: int | None) -> None:
    """Write the trial into the run's `result.json`."""
    path = RunFiles(folder).result
    about: dict[str, Any] = {"study": trial.study.study_name, "trial": trial.number}
    write_json(path, {**read_json(path), **about, "pruned": pruned_at is not None})
