"""Pictures of the experiments, each made of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.lab.ceiling import level_at
from fst_optimizer.lab.curves import score_band
from fst_optimizer.lab.decompose import CELLS
from fst_optimizer.lab.drift import OTHER, OWN, PROBE, along
from fst_optimizer.lab.figures import LEGEND, color_of
from fst_optimizer.lab.plasticity import BASE, curves_by_start
from fst_optimizer.lab.stream import forgetting
from fst_optimizer.stats import mean
from fst_optimizer.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
CELL_NAMES = {"base": "base", "prompt": "prompt only", "weights": "weights only", "both": "both"}
CELL_COLORS = {"base": "#b0b7bd", "prompt": "#2e8b57", "weights": "#2c6fbb", "both": "#c0392b"}
STAGE_COLORS = ("#2c6fbb", "#c0392b", "#2e8b57", "#8e5ea2", "#d98b1f")
MOST_COLUMNS = 3


def decompose_figure(rows: Rows) -> Figure:
    """A panel a rule and kind: four bars a method, means over its runs, and a dot a run."""
    figure, panels = _panels(list(_units(rows)))
    for axes, own in zip(panels, _units(rows).values(), strict=True):
        methods = _distinct(own, "method")
        for place, cell in enumerate(CELLS):
            scores = [[row[cell] for row in own if row["method"] == method] for method in methods]
            at = [number + (place - 1.5) * 0.2 for number in range(len(methods))]
            axes.bar(at, [mean(some) for some in scores], 0.18, color=CELL_COLORS[cell], label=CELL_NAMES[cell])
            dots = [(x, score) for x, some in zip(at, scores, strict=True) for score in some]
            axes.scatter(*zip(*dots, strict=True), color="black", s=8, zorder=3)
        axes.set_xticks(range(len(methods)), [plain(method) for method in methods], parse_math=False)
        axes.set(ylim=(0, 1), ylabel="test score (greedy)", axisbelow=True)
    _legend(panels[0], "weights and instructions; one dot a run")
    return figure


def drift_figure(rows: Rows) -> Figure:
    """Score and KL along the runs: on the runs' own prompts above, on probes and on other tasks below."""
    roles = {OWN: "on its own prompts", PROBE: "on probes, rightly instructed", OTHER: "on other tasks"}
    shown = [role for role in roles if any(row["role"] == role for row in rows)]
    figure, panels = _panels([f"{what} {roles[role]}" for role in shown for what in ("score", "KL to base")], columns=2)
    for role, pair in zip(shown, zip(panels[::2], panels[1::2], strict=True), strict=True):
        methods = _distinct(rows, "method")
        for run, some in along(rows, role).items():
            for axes, name in zip(pair, ("score", "kl"), strict=True):
                axes.plot(
                    [one["rollouts"] for one in some],
                    [one[name] for one in some],
                    color=color_of(run[1], methods.index(run[1])),
                    label=run[1],
                    marker=".",
                    linewidth=0.9,
                    alpha=0.8,
                )
        pair[0].set(ylim=(0, 1.03), ylabel="score (greedy)")
        pair[1].set(ylabel="nats a token")
    for axes in panels[-2:]:
        axes.set_xlabel("training rollouts (fast + slow)")
    _legend(panels[0], "one line a run, one point an end of a cycle")
    return figure


def plasticity_figure(rows: Rows) -> Figure:
    """A panel: the learning curves on the second task, by the weights that they begin with."""
    figure, (axes,) = _panels([f"{rows[0]['method']} on {rows[0]['task']}, by the weights it begins with"])
    for place, (start, curves) in enumerate(curves_by_start(rows).items()):
        color = "black" if start == BASE else color_of(start, place)
        places, lows, means, highs = zip(*score_band(curves), strict=True)
        axes.plot(places, means, color=color, marker=".", label=f"from {start}, {len(curves)} run(s)")
        axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set(ylim=(0, 1), xlabel="training rollouts on this task", ylabel="validation score (greedy)")
    _legend(axes, "lines: mean over runs; bands: lowest to highest")
    return figure


def ceiling_figure(rows: Rows) -> Figure:
    """A panel a rule and kind: evaluations as dots, and where a ceiling is told, the fit and the ceiling's interval."""
    figure, panels = _panels(list(_units(rows)))
    for axes, own in zip(panels, _units(rows).values(), strict=True):
        methods = _distinct(own, "method")
        for number, row in enumerate(own):
            color = color_of(row["method"], methods.index(row["method"]))
            spent, scores, _ = zip(*row["curve"], strict=True)
            axes.scatter(spent, scores, s=9, color=color, alpha=0.7, label=row["method"])
            if row["A"] is None:
                continue
            grid = [spent[-1] * step / 200 for step in range(201)]
            axes.plot(grid, [level_at(row, scores[0], at) for at in grid], color=color, linewidth=1)
            bar = [[row["A"] - row["low"]], [row["high"] - row["A"]]]
            right = spent[-1] * (1.02 + 0.02 * number)
            axes.errorbar([right], [row["A"]], yerr=[[max(0.0, end[0])] for end in bar], color=color, capsize=2)
        axes.set(ylim=(0, 1.03), xlabel="training rollouts", ylabel="validation score (greedy)")
    _legend(panels[0], "dots: evaluations; lines: fits; bars: ceilings, 95%")
    return figure


def stream_figure(rows: Rows) -> Figure:
    """A column a method: each run's score on the task at hand, and below how all tasks are done after each stage."""
    methods = _distinct(rows, "method")
    titles = [*methods, *(f"{method}: scores on all tasks" for method in methods)]
    figure, panels = _panels(titles, columns=len(methods))
    for method, above, below in zip(methods, panels, panels[len(methods) :], strict=False):
        own = [row for row in rows if row["method"] == method]
        for row in own:
            spent, scores, _ = zip(*row["curve"], strict=True)
            at = [row["start"] + one for one in spent]
            above.plot(at, scores, color=STAGE_COLORS[row["place"] % len(STAGE_COLORS)], marker=".", linewidth=0.9)
            if row["place"]:
                above.axvline(row["start"], color="black", linewidth=0.6, linestyle=":")
            noticed = [row["start"] + one for one in row["switches"]]
            above.scatter(noticed, [0.0] * len(noticed), marker="^", color="black", s=22, zorder=3, clip_on=False)
        label = "training rollouts; triangles: switch noticed"
        above.set(ylim=(0, 1.03), xlabel=label, ylabel="score on the task at hand")
        _matrix(below, *forgetting(own))
    return figure


def _matrix(axes: Any, names: Sequence[str], matrix: Sequence[Sequence[float]]) -> None:
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    axes.grid(visible=False)
    for down, some in enumerate(matrix):
        for across, score in enumerate(some):
            color = "white" if score > 0.6 else "black"
            axes.text(across, down, f"{score:.2f}", ha="center", va="center", color=color)
    short = [plain(name.rpartition(":")[2]) for name in names]
    axes.set_xticks(range(len(names)), short, parse_math=False, rotation=20, ha="right", fontsize="small")
    axes.set_yticks(range(len(matrix)), ["before", *(f"after {one + 1}" for one in range(len(matrix) - 1))])


def save(figure: Figure, path: Path) -> Path:
    """Write it; without the version stamp the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


FIGURES: dict[str, Callable[[Rows], Figure]] = {
    "decompose": decompose_figure,
    "drift": drift_figure,
    "plasticity": plasticity_figure,
    "ceiling": ceiling_figure,
    "stream": stream_figure,
}


def _distinct(rows: Rows, name: str) -> list[str]:
    return list(dict.fromkeys(str(row[name]) for row in rows))


def _units(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by their rule, and by their kind of feedback where there are several."""
    kinds, found = len(_distinct(rows, "kind")) > 1, dict[str, list[Mapping[str, Any]]]()
    for row in rows:
        found.setdefault(f"{row['rule']}+{row['kind']}" if kinds else str(row["rule"]), []).append(row)
    return found


def _panels(titles: Sequence[str], columns: int = MOST_COLUMNS) -> tuple[Figure, list[Any]]:
    # Figures of their own, without pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    columns = min(columns, len(titles))
    lines = -(-len(titles) // columns)
    width = 7 if columns == 1 else 4.6 * columns
    figure = Figure(figsize=(width, (4.4 if columns == 1 else 3.4) * lines), layout="constrained")
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in every[len(titles) :]:
        axes.remove()
    panels = every[: len(titles)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(plain(title), parse_math=False, fontsize="medium")  # a name with dollars is no formula
        axes.grid(alpha=0.25)
    return figure, panels


def _legend(axes: Any, title: str) -> None:
    """One entry a name, however many runs have it."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend = axes.legend(named.values(), map(plain, named), **LEGEND, title=title, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
