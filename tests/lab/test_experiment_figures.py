import pytest

from fst_optimizer.lab.decompose import cells
from fst_optimizer.lab.experiment_figures import FIGURES, save
from helpers.figures import is_png

RUN = {"task": "t:sort", "family": "t", "rule": "sort", "kind": "told", "seed": 0, "run": "sort/fst-seed0"}
CURVE = [[0, 0.1, 0.0], [100, 0.4, 0.1], [200, 0.5, 0.2]]
FIT = {"A": 0.6, "C_mid": 90.0, "B": 1.5, "low": 0.5, "high": 0.8, "why": None}


def told(method, kind="told", **fields):
    return {**RUN, "method": method, "kind": kind, **fields}


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_decompose_has_four_bars_a_method_and_a_panel_a_kind():
    scores = cells({"base": [0.0, 0.2], "prompt": [0.4, 0.4], "weights": [0.5, 0.5], "both": [1.0, 0.8]})
    rows = [told("fst", "told", **scores), told("rl", "told", **scores), told("fst", "shown", **scores)]
    figure = FIGURES["decompose"](rows)
    assert titles(figure) == ["sort+told", "sort+shown"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([0.1, 0.1, 0.4, 0.4, 0.5, 0.5, 0.9, 0.9])  # by cell, then by method
    assert titles(FIGURES["decompose"](rows[:2])) == ["sort"]


def test_drift_has_a_pair_of_panels_for_each_thing_that_it_was_measured_on():
    rows = [
        told("fst", role=role, on=on, rollouts=spent, score=0.5, kl=spent / 100)
        for role, on in (("own", "t:sort"), ("probe", "a"), ("probe", "b"))
        for spent in (0, 100)
    ]
    figure = FIGURES["drift"](rows)
    assert len(figure.axes) == 4
    (line,) = figure.axes[3].lines
    assert [list(values) for values in line.get_data()] == [[0, 100], [0.0, 1.0]]


def test_a_ceiling_is_drawn_where_one_is_told(tmp_path):
    none = dict.fromkeys(FIT) | {"why": "no gain"}
    figure = FIGURES["ceiling"]([told("fst", curve=CURVE, **FIT), told("rl", curve=CURVE, **none)])
    assert len(figure.axes[0].containers) == 1  # one bar for the interval
    assert is_png(save(figure, tmp_path / "new" / "ceiling.png"))
    assert save(figure, tmp_path / "again.png").read_bytes() == (tmp_path / "new" / "ceiling.png").read_bytes()


def test_plasticity_has_a_line_for_each_start():
    figure = FIGURES["plasticity"]([told("rl", start=start, curve=CURVE) for start in ("fst", "fst", "base")])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["from fst, 2 run(s)", "from base, 1 run(s)"]
