"""Optuna's plots of a study, each as a page to move about in and as a picture."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import optuna.visualization as pages
from matplotlib import pyplot
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization import matplotlib as pictures

from fst_optimizer.tuning.storage import quiet_optuna

if TYPE_CHECKING:
    from optuna import Study

logger = logging.getLogger(__name__)


def draw_plots(study: Study, objectives: Sequence[str], folder: Path, *, importance: bool) -> None:
    """`history`, `slice`, `importance` and, by the number of objectives, `curves` or `pareto`, as .html and .png.

    With several objectives the first three show the score. A plot that the study is too small for is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return
    backend = matplotlib.get_backend()
    matplotlib.use("agg")  # files only, whatever display there is
    try:
        with quiet_optuna(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layouts that are too tight
            for name, plot, options in _plots(objectives, importance):
                try:
                    page, axes = (getattr(module, f"plot_{plot}")(study, **options) for module in (pages, pictures))
                except (ValueError, RuntimeError) as error:
                    logger.warning("no plot of %s: %s", name, error)
                    continue
                page.write_html(folder / f"{name}.html", include_plotlyjs="directory")
                figure = np.atleast_1d(axes).flat[0].figure
                figure.savefig(folder / f"{name}.png", bbox_inches="tight")
                pyplot.close(figure)
    finally:
        matplotlib.use(backend)


def _plots(objectives: Sequence[str], importance: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, what Optuna calls it after `plot_`, and its options."""
    score: dict[str, Any] = {"target_name": "score"}
    if len(objectives) > 1:
        place = list(objectives).index("score")
        score["target"] = lambda trial: trial.values[place]
    yield "history", "optimization_history", score
    yield "slice", "slice", score
    if importance:
        yield "importance", "param_importances", {**score, "evaluator": FanovaImportanceEvaluator(seed=0)}
    if len(objectives) == 1:
        yield "curves", "intermediate_values", {}
    if len(objectives) in (2, 3):
        yield "pareto", "pareto_front", {"target_names": list(objectives)}
