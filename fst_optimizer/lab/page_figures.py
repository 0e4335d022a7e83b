"""The figures of the results page: one a rule, one an experiment. Their data are pure functions of the kept rows."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.lab import sections
from fst_optimizer.lab.figures import LEGEND, color_of
from fst_optimizer.lab.verdicts import Cell, end_curve
from fst_optimizer.stats import mean
from fst_optimizer.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAMP = "data-sha256"
"""In a figure's file: the checksum of what it shows, so that a test can tell whether it is the page's."""
DPI, COLORS = 80, 64
STYLES = ("-", "--", ":", "-.")
Look = tuple[str, Any]
"""Colour and line style."""
Panels = dict[str, Any]
"""A figure's data: `{title, xlabel, ylabel, panels: {title: {label: [{"line" or "dots": [[x, y], ...]}]}}}`.

`scores_above`: a panel has the axis of scores where its highest value is above this.
"""


def file_name(*names: str) -> str:
    """`letters-drop_first-sort.png`: what a figure is of, as a file's name."""
    return "-".join(re.sub(r"[^\w-]+", "-", name).strip("-") or "task" for name in names) + ".png"


def rule_data(cells: Sequence[Cell], rule: str) -> Panels:
    """Score against training rollouts under one rule: a panel a kind of feedback, a line a run, ends alone as dots."""
    panels: dict[str, dict[str, Any]] = {}
    for cell in cells:
        panel = panels.setdefault(cell.kind, {})
        for method, by_unit in cell.runs.items():
            for row in (row for rows in by_unit.values() for row in rows if row["rule"] == rule):
                points = [[point.rollouts, point.score] for point in end_curve(row)]
                one = {"line": points} if len(points) > 2 else {"dots": points[-1:]}
                panel.setdefault(method, []).append(one)
    title = f"{cells[0].family}: {rule}"
    labels = {"xlabel": "training rollouts (fast + slow)", "ylabel": "validation score (greedy)"}
    return {"title": title, **labels, "scores_above": 0.0, "panels": panels}


def experiment_data(rows: Sequence[Mapping[str, Any]], section: sections.Section) -> Panels:
    """A panel for each of the first measured columns; along an axis a line a group, else a dot a unit."""
    by, values = sections.columns(rows, section)
    names = [name for name in by if len({sections.cell_of(row, name) for row in rows}) > 1] or by[-1:]
    panels: dict[str, dict[str, Any]] = {}
    if section.along and any(section.along in row for row in rows):
        for name in values[:3]:
            found = sections.lines_along(rows, section, name, names)
            panels[name] = {" ".join(group): [{"line": points}] for group, points in found.items()}
        return {"title": section.title, "xlabel": section.along, "ylabel": "mean over rules", "panels": panels}
    for group, own in sections.grouped(rows, names).items():
        for name in values[:5]:
            units = sections.by_unit(own, name)
            panels.setdefault(name, {})[" ".join(group)] = [{"dots": [[0, units[unit]] for unit in sorted(units)]}]
    return {"title": section.title, "xlabel": "", "ylabel": "a dot a rule, a dash the mean", "panels": panels}


def checksum(data: Panels) -> str:
    """Of a figure's data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(data: Panels) -> Figure:
    """The figure of such data."""
    from matplotlib.figure import Figure

    panels, along = data["panels"], bool(data["xlabel"])
    figure = Figure(figsize=((3.6 if along else 2.2) * len(panels) + 1.8, 3.1), layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    looks = looks_of(labels)
    for (name, panel), axes in zip(panels.items(), every_axes, strict=True):
        axes.set_title(plain(name), fontsize="medium", parse_math=False)
        axes.set(xlabel=data["xlabel"])
        axes.grid(alpha=0.25)
        for place, label in enumerate(labels):
            for one in panel.get(label, ()):
                _draw_one(axes, one, looks[label], None if along else place)
        if not along:
            axes.set_xticks([])
        _limit(axes, panel, data.get("scores_above", 0.2 if along else 0.05))
    every_axes[0].set_ylabel(data["ylabel"])
    handles = [_handle(looks[label], label) for label in labels]
    for text in figure.legend(handles=handles, loc="outside right upper", fontsize="small", **LEGEND).get_texts():
        text.set_parse_math(False)
    figure.suptitle(plain(data["title"]), fontsize="large", parse_math=False)
    return figure


def looks_of(labels: Sequence[str]) -> dict[str, Look]:
    """Colour and line style of every label: the colour by its last word, the method; the style by what is before."""
    parts = {label: label.rpartition(" ")[::2] for label in labels}
    befores = list(dict.fromkeys(before for before, _ in parts.values()))
    methods = list(dict.fromkeys(method for _, method in parts.values()))
    return {
        label: (color_of(method, methods.index(method)), STYLES[befores.index(before) % len(STYLES)])
        for label, (before, method) in parts.items()
    }


def _limit(axes: Axes, panel: Mapping[str, Any], least: float) -> None:
    """Scores have the same axis everywhere: a panel whose values lie between 0 and 1, the highest above `least`."""
    values = [point[1] for some in panel.values() for one in some for points in one.values() for point in points]
    if values and min(values) >= 0 and least < max(values) <= 1:
        axes.set_ylim(0, 1.02)


def _draw_one(axes: Axes, one: Mapping[str, Any], look: Look, place: int | None) -> None:
    ((kind, points),) = one.items()
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    color, style = look
    if kind == "line":
        axes.plot(xs, ys, color=color, linestyle=style, marker=".", markersize=4, linewidth=1.2)
    elif place is None:
        axes.scatter(xs, ys, color=color, marker="x", zorder=3)
    else:
        axes.scatter([place] * len(ys), ys, color=color, s=14, alpha=0.7)
        axes.plot([place - 0.35, place + 0.35], [mean(ys)] * 2, color=color, linestyle=style, linewidth=2)


def _handle(look: Look, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=look[0], linestyle=look[1], marker=".", label=plain(label))


def save(data: Panels, path: Path) -> None:
    """Draw and write as a small PNG: few colours, and stamped with the checksum of its data."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn = io.BytesIO()
    draw(data).savefig(drawn, dpi=DPI, metadata={"Software": None})
    info = PngInfo()
    info.add_text(STAMP, checksum(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, pnginfo=info, optimize=True)


def stamp_of(path: Path) -> str | None:
    """The checksum of the data that a figure's file was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(STAMP)
