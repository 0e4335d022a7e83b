"""Pictures of a comparison: score against what it cost, and KL against score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.lab.curves import Point, score_band
from fst_optimizer.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "fst": "#c0392b",
    "rl": "#2c6fbb",
    "gepa": "#2e8b57",
    "sequential": "#8e6bbf",
    "once": "#d4ac0d",
    "sft": "#17a2a2",
    "fst+k1": "#d98880",
    "fst+adaptive": "#641e16",
    "rl+sweep": "#7fb3d5",
    "dspy-gepa": "#7f8c2d",
    "dspy-grpo": "#e67e22",
    "dspy-together": "#34495e",
}
OTHERS = ("#7dcea0", "#c39bd3", "#f0b27a", "#909497", "#a04000", "#1b4f72")
"""Of methods with a label or on another engine, by their place in the comparison."""
LEGEND: dict[str, Any] = {"frameon": False, "title_fontsize": "x-small"}
SCORES, DRIFT = "score_by_rollouts.png", "kl_by_score.png"


def draw_all(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Both figures of one task's `compare.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {folder / SCORES: score_figure(data), folder / DRIFT: drift_figure(data)}
    for path, figure in figures.items():
        # Without the version stamp the same numbers give the same file.
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return list(figures)


def curves_by_method(data: Mapping[str, Any]) -> dict[str, list[list[Point]]]:
    """The runs' curves as they were written."""
    found: dict[str, list[list[Point]]] = {}
    for run in data["runs"]:
        found.setdefault(run["method"], []).append([Point(*point) for point in run["curve"]])
    return found


def only_ends(curves: Sequence[Sequence[Point]]) -> bool:
    """Whether a method was evaluated only before and after: a line between the two points would show no measurement."""
    return all(len(curve) <= 2 for curve in curves)


def color_of(method: str, place: int) -> str:
    """A method's own colour; of one without, by its place."""
    return COLORS.get(method, OTHERS[place % len(OTHERS)])


def score_figure(data: Mapping[str, Any]) -> Figure:
    """Validation score against training rollouts, methods that were evaluated only at their ends as crosses."""
    figure, axes = _axes("training rollouts (fast + slow)", "validation score (greedy)", data["task"])
    for place, (method, curves) in enumerate(curves_by_method(data).items()):
        color, label = color_of(method, place), f"{method}, {len(curves)} seed(s)"
        if only_ends(curves):
            ends = [curve[-1] for curve in curves]
            spent, scores = [point.rollouts for point in ends], [point.score for point in ends]
            axes.scatter(spent, scores, label=label, color=color, marker="x", zorder=3)
            continue
        places, lows, means, highs = zip(*score_band(curves), strict=True)
        axes.plot(places, means, label=label, color=color, marker=".", markersize=4)
        axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1)
    _legend(axes, "lines: mean over seeds; bands: lowest to highest seed; x: ends alone")
    return figure


def drift_figure(data: Mapping[str, Any]) -> Figure:
    """KL to base against validation score, one line a run."""
    figure, axes = _axes("validation score (greedy)", "KL to base (nats a token)", data["task"])
    for place, (method, curves) in enumerate(curves_by_method(data).items()):
        for number, curve in enumerate(curves):
            shown, marker = (curve[-1:], "x") if only_ends(curves) else (curve, ".")
            axes.plot(
                [point.score for point in shown],
                [point.kl for point in shown],
                label=None if number else method,
                color=color_of(method, place),
                marker=marker,
                linewidth=0.8,
                alpha=0.8,
            )
    _legend(axes, "one line a seed, one point an evaluation")
    return figure


def _legend(axes: Any, title: str) -> None:
    for text in axes.legend(**LEGEND, title=title).get_texts():
        text.set_parse_math(False)


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Any]:
    # Figures of their own, without pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(plain(title), parse_math=False)  # a name with dollars is no formula
    axes.grid(alpha=0.25)
    return figure, axes
