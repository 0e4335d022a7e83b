"""Pictures of a comparison: score against what it cost, and KL against score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.lab.curves import Point, score_band

COLORS = {
    "fst": "#c0392b",
    "rl": "#2c6fbb",
    "gepa": "#2e8b57",
    "sequential": "#8e6bbf",
    "dspy-gepa": "#7f8c2d",
    "dspy-grpo": "#e67e22",
    "dspy-together": "#34495e",
}
OTHERS = ("#d98880", "#7fb3d5", "#7dcea0", "#c39bd3", "#f0b27a", "#909497")
"""Of methods with a label or on another engine, by their place in the comparison."""
SCORES, DRIFT = "score_by_rollouts.png", "kl_by_score.png"


def draw_all(data: Mapping[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Both figures of one task's `compare.json`."""
    return [_score_figure(data, folder / f"{prefix}{SCORES}"), _drift_figure(data, folder / f"{prefix}{DRIFT}")]


def curves_by_method(data: Mapping[str, Any]) -> dict[str, list[list[Point]]]:
    """The runs' curves as they were written."""
    found: dict[str, list[list[Point]]] = {}
    for run in data["runs"]:
        found.setdefault(run["method"], []).append([Point(*point) for point in run["curve"]])
    return found


def only_ends(curves: Sequence[Sequence[Point]]) -> bool:
    """Whether a method was evaluated only before and after: a line between the two points would show no measurement."""
    return all(len(curve) <= 2 for curve in curves)


def _color(method: str, place: int) -> str:
    return COLORS.get(method, OTHERS[place % len(OTHERS)])


def _score_figure(data: Mapping[str, Any], path: Path) -> Path:
    figure, axes = _axes("training rollouts (fast + slow)", "validation score (greedy)", data["task"])
    for place, (method, curves) in enumerate(curves_by_method(data).items()):
        color = _color(method, place)
        if only_ends(curves):
            ends = [curve[-1] for curve in curves]
            spent, scores = [point.rollouts for point in ends], [point.score for point in ends]
            axes.scatter(spent, scores, label=f"{method}, {len(curves)} seed(s)", color=color, marker="x", zorder=3)
            continue
        places, lows, means, highs = zip(*score_band(curves), strict=True)
        axes.plot(places, means, label=f"{method}, {len(curves)} seed(s)", color=color, marker=".", markersize=4)
        axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1)
    return _save(figure, axes, path, "lines: mean over seeds; bands: lowest to highest seed; x: ends alone")


def _drift_figure(data: Mapping[str, Any], path: Path) -> Path:
    figure, axes = _axes("validation score (greedy)", "KL to base (nats a token)", data["task"])
    colors = {method: _color(method, place) for place, method in enumerate(curves_by_method(data))}
    for method, curves in curves_by_method(data).items():
        for number, curve in enumerate(curves):
            label = method if not number else None
            shown, marker = (curve[-1:], "x") if only_ends(curves) else (curve, ".")
            scores, kls = [point.score for point in shown], [point.kl for point in shown]
            axes.plot(scores, kls, label=label, color=colors[method], marker=marker, linewidth=0.8, alpha=0.8)
    return _save(figure, axes, path, "one line a seed, one point an evaluation")


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    # Figures of their own, without pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, note: str) -> Path:
    axes.legend(frameon=False, title=note, title_fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version stamp the same numbers give the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
