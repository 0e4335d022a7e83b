"""Optuna's plots of a study, each as a page to move about in and as a picture."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.tuning.storage import quiet_optuna

if TYPE_CHECKING:
    from optuna import Study

logger = logging.getLogger(__name__)
IN_A_PICTURE = 7
"""Parameters that a picture of slices has room for."""
LEAST_COMPLETE = 4
"""Complete trials that fANOVA needs before its forest means anything."""


def draw_plots(study: Study, objectives: Sequence[str], folder: Path) -> list[Path]:
    """`history`, `slice`, `importance` and, by the number of objectives, `curves` or `pareto`, as .html and .png.

    With several objectives the first three show the score. A plot that the study is too small for is left out.
    """
    import optuna.visualization as pages
    from optuna.visualization import matplotlib as pictures

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    with quiet_optuna(), _quiet_figures():
        for name, draw in _plots(study, objectives).items():
            try:
                page, axes = draw(pages), draw(pictures)
            except (ValueError, RuntimeError) as error:
                logger.warning("no plot of %s: %s", name, error)
                continue
            page.write_html(folder / f"{name}.html", include_plotlyjs="directory")
            _save(axes, folder / f"{name}.png")
            paths += [folder / f"{name}.html", folder / f"{name}.png"]
    return paths


def _plots(study: Study, objectives: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """Name -> what draws it, given one of Optuna's two modules."""
    from optuna.importance import FanovaImportanceEvaluator

    place = list(objectives).index("score")
    one = len(objectives) == 1
    score: dict[str, Any] = {"target_name": "score"}
    if not one:
        score["target"] = lambda trial: trial.values[place]
    evaluator = FanovaImportanceEvaluator(seed=0)
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    found: dict[str, Callable[[Any], Any]] = {}
    if complete:
        found["history"] = lambda module: module.plot_optimization_history(study, **score)
        found["slice"] = partial(_slices, study, score)
    if len(complete) >= LEAST_COMPLETE:
        found["importance"] = lambda module: module.plot_param_importances(study, evaluator=evaluator, **score)
    if one and complete:
        found["curves"] = partial(_curves, study)
    if len(objectives) in (2, 3) and complete:
        found["pareto"] = lambda module: module.plot_pareto_front(study, target_names=list(objectives))
    return found


def _slices(study: Study, score: dict[str, Any], module: Any) -> Any:
    """All parameters on the page; in the picture, which nobody can move about in, those that vary most."""
    if module.__name__.endswith("visualization"):
        return module.plot_slice(study, **score)
    drawn = Counter(name for trial in study.get_trials(deepcopy=False) for name in trial.params)
    different = {
        name: len({str(trial.params.get(name)) for trial in study.get_trials(deepcopy=False)}) for name in drawn
    }
    most = sorted(drawn, key=lambda name: (-drawn[name], -different[name]))[:IN_A_PICTURE]
    axes = module.plot_slice(study, params=most, **score)
    for axis in axes if hasattr(axes, "__len__") else [axes]:
        axis.tick_params(axis="x", labelsize=6, which="both", labelrotation=30)
        axis.set_xlabel(axis.get_xlabel(), fontsize=7)
    return axes


def _curves(study: Study, module: Any) -> Any:
    """Scores on the way. In the picture: what was given up in grey, what ended in blue, the best in red."""
    if module.__name__.endswith("visualization"):
        return module.plot_intermediate_values(study)
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6.4, 4.0))
    best = study.best_trial.number
    styles = {"pruned": ("#b0b0b0", 1.0), "complete": ("#2c6fbb", 1.2), "the best": ("#c0392b", 2.2)}
    told = set()
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: (trial.number == best, trial.number)):
        kind = "the best" if trial.number == best else trial.state.name.lower()
        if kind in styles and trial.intermediate_values:
            color, width = styles[kind]
            points = sorted(trial.intermediate_values.items())
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, marker="o", markersize=3)
            told.add(kind)
    for kind in styles:
        if kind in told:
            axes.plot([], [], color=styles[kind][0], linewidth=2, label=kind)
    axes.set(xlabel="point of the grid of rollouts", ylabel="validation score", title="Scores on the way")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def importances(study: Study, objectives: Sequence[str]) -> dict[str, float]:
    """Parameter -> its share of the score's variance by fANOVA; empty where there are too few complete trials.

    Parameters that only some trials have are left out, as fANOVA does.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < LEAST_COMPLETE:
        return {}
    place = list(objectives).index("score")
    target = None if len(objectives) == 1 else lambda trial: trial.values[place]
    try:
        with quiet_optuna():
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), target=target)
    except (ValueError, RuntimeError) as error:  # e.g. all scores are equal
        logger.warning("no importances: %s", error)
        return {}
    return {name: float(value) for name, value in found.items()}


def _save(axes: Any, path: Path) -> None:
    import numpy as np
    from matplotlib import pyplot

    figure = np.atleast_1d(axes).flat[0].figure
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


@contextmanager
def _quiet_figures() -> Iterator[None]:
    """Figures are drawn into files, whatever display there is; tight layouts that do not fit are no news."""
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        matplotlib.use(before)
