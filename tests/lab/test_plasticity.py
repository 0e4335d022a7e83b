import pytest

from fst_optimizer.lab.curves import Point
from fst_optimizer.lab.plan import Common
from fst_optimizer.lab.plasticity import BASE, Start, area, curves_by_start, plasticity_jobs, table


def test_the_height_of_a_curve_is_its_mean_over_rollouts():
    # 0.2 to 0.6 over 100 rollouts, then 0.6 to 0.8 over 300: (40 + 210) / 400.
    curve = [Point(0, 0.2, 0), Point(100, 0.6, 0), Point(400, 0.8, 0)]
    assert area(curve) == pytest.approx(0.625)
    assert area(curve[:1]) == 0.2


def test_every_start_is_run_with_every_seed_and_the_base_last(tmp_path):
    starts = [Start("sort-fst-seed0", tmp_path / "fst"), Start(BASE)]
    jobs = plasticity_jobs("programs/letters:double", tmp_path / "double", starts, (4, 5), Common(100))
    assert [job.folder.name for job in jobs] == [
        "rl+from-sort-fst-seed0-seed4",
        "rl+from-base-seed4",
        "rl+from-sort-fst-seed0-seed5",
        "rl+from-base-seed5",
    ]
    words = " ".join(jobs[0].command())
    assert "--method rl " in words and f"--start-from {tmp_path / 'fst'}" in words
    assert "--start-from" not in " ".join(jobs[1].command())


def rows():
    shared = {"task": "t", "method": "rl", "kl_to_base": 0.5, "test_score_before": 0.1}
    return [
        {**shared, "start": "rl", "start_kl": 1.0, "test_score_after": 0.2, "area": 0.1, "curve": [[0, 0.1, 0.0]]},
        {**shared, "start": "rl", "start_kl": 2.0, "test_score_after": 0.4, "area": 0.3, "curve": [[0, 0.2, 0.0]]},
        {**shared, "start": BASE, "test_score_after": 0.9, "area": 0.7, "curve": [[0, 0.3, 0.0]]},
    ]


def test_runs_are_grouped_by_the_method_that_left_the_weights():
    assert curves_by_start(rows()) == {"rl": [[Point(0, 0.1, 0.0)], [Point(0, 0.2, 0.0)]], BASE: [[Point(0, 0.3, 0.0)]]}
    assert table(rows())[1] == [
        ["rl", "2", "1.500", "0.100", "0.300", "0.200", "0.500"],
        [BASE, "1", "-", "0.100", "0.900", "0.700", "0.500"],
    ]
