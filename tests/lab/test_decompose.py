import pytest

from fst_optimizer.lab.decompose import cells, table

SCORES = {
    "base": [0.0, 0.0, 1.0, 0.0],
    "prompt": [0.5, 0.0, 1.0, 0.5],
    "weights": [1.0, 0.0, 1.0, 0.0],
    "both": [1.0, 1.0, 1.0, 0.0],
}


def test_the_cells_are_means_and_the_gains_are_paired_by_example():
    found = cells(SCORES)
    assert {name: found[name] for name in ("examples", *SCORES)} == {
        "examples": 4,
        "base": 0.25,
        "prompt": 0.5,
        "weights": 0.5,
        "both": 0.75,
    }
    # Differences 0.5, 0, 0, 0.5: mean 0.25, standard error sqrt(1/12) / 2, and t(0.975, 3) = 3.18245.
    gain = found["prompt_gain"]
    assert gain["mean"] == 0.25 and gain["n"] == 4
    assert gain["high"] - gain["mean"] == pytest.approx(3.18245 * (1 / 12) ** 0.5 / 2, abs=1e-5)
    assert (found["weights_gain"]["mean"], found["both_gain"]["mean"]) == (0.25, 0.5)


def test_the_interaction_is_what_both_bring_beyond_the_sum_of_each_alone():
    # By example 1 - 0.5 - 1 + 0, 1 - 0 - 0 + 0, 1 - 1 - 1 + 1, 0 - 0.5 - 0 + 0.
    assert cells(SCORES)["interaction"]["mean"] == pytest.approx((-0.5 + 1 + 0 - 0.5) / 4)
    alike = {cell: [0.5, 1.0] for cell in SCORES}
    assert {cells(alike)[name]["mean"] for name in ("prompt_gain", "weights_gain", "both_gain", "interaction")} == {0.0}


def test_the_table_has_a_line_a_run():
    row = {"rule": "sort", "method": "fst", "seed": 3, **cells(SCORES)}
    _, (line,) = table([row])
    assert line[:7] == ["sort", "fst", "3", "0.250", "0.500", "0.500", "0.750"]
