import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab.subjects import by_run, finished_runs
from helpers.runs import RL_CURVE, write_run


def test_finished_runs_are_found_at_a_place_and_below_it(tmp_path):
    folders = [tmp_path / "out" / "sort" / "rl-seed0", tmp_path / "out" / "sort" / "fst-seed0", tmp_path / "own"]
    for folder in folders:
        write_run(folder, folder.name.partition("-")[0].replace("own", "fst"), 0, RL_CURVE)
    write_run(tmp_path / "out" / "sort" / "fst-seed1", "fst", 1, RL_CURVE)
    (tmp_path / "out" / "sort" / "fst-seed1" / "result.json").unlink()  # not finished
    assert finished_runs([tmp_path / "own"]) == [tmp_path / "own"]
    assert sorted(finished_runs([tmp_path])) == sorted(folders)
    assert finished_runs([tmp_path / "out"], ("rl",)) == [folders[0]]
    write_run(tmp_path / "out" / "sort" / "sft-seed0", "sft", 0, RL_CURVE)  # leaves no policy versions
    assert sorted(finished_runs([tmp_path])) == sorted(folders)
    with pytest.raises(UserError, match=r"has no finished run of gepa: give run directories, or a folder that fst lab"):
        finished_runs([tmp_path], ("gepa",))
    with pytest.raises(UserError, match=r"has no finished run: give"):
        finished_runs([tmp_path / "nothing"])


def test_rows_are_grouped_by_the_run_that_they_are_about():
    rows = [
        {"task": "t", "method": "rl", "seed": seed, "run": f"a/rl-seed{seed}", "x": x}
        for seed, x in ((0, 1), (1, 2), (0, 3))
    ]
    assert [[row["x"] for row in some] for some in by_run(rows).values()] == [[1, 3], [2]]
