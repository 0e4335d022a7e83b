import pytest

from fst_optimizer.lab.compare import save_comparison
from fst_optimizer.lab.figures import curves_by_method, draw_all, drift_figure, only_ends, score_figure
from helpers.runs import EXTRA, FST_CURVE, RL_CURVE


@pytest.fixture
def data(fabricated):
    root, runs = fabricated
    return save_comparison(runs, root, extra=EXTRA)


def lines_of(figure):
    return [list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]


def test_scores_are_drawn_against_training_rollouts_as_means_over_seeds(data):
    figure = score_figure(data)
    fst, rl = lines_of(figure)
    # The second seed of fst ends at 50 rollouts, and the line with it; both seeds of rl are alike.
    assert fst == [(fast + slow, score) for fast, slow, score, _ in FST_CURVE[:2]]
    assert rl == [(fast + slow, pytest.approx(score)) for fast, slow, score, _ in RL_CURVE]
    (gepa,) = [cross for cross in figure.axes[0].collections if cross.get_label().startswith("gepa")]
    assert gepa.get_offsets().tolist() == [[100, 0.4], [100, 0.4]]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["fst, 2 seed(s)", "rl, 2 seed(s)", "gepa, 2 seed(s)"]


def test_drift_is_drawn_against_the_score_one_line_a_run(data):
    lines = lines_of(drift_figure(data))
    assert len(lines) == 6
    assert lines[0] == [(score, kl) for _, _, score, kl in FST_CURVE]
    assert lines[-1] == [(0.4, 0.0)]


def test_the_same_numbers_give_the_same_files(data, tmp_path):
    once, again = draw_all(data, tmp_path / "a"), draw_all(data, tmp_path / "b")
    assert [path.name for path in again] == [path.name for path in once]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert once[0].read_bytes() != once[1].read_bytes()


def test_a_method_that_was_evaluated_twice_has_ends_and_no_line(data):
    curves = curves_by_method(data)
    assert {method: only_ends(some) for method, some in curves.items()} == {
        "fst": False,  # one of its seeds has three points
        "rl": False,
        "gepa": True,
    }
