import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab.plan import Common
from fst_optimizer.lab.sweep import pick_rates, picked_sets, save_sweep, sweep_jobs
from helpers.runs import RL_CURVE, write_run


def test_of_the_rates_that_end_level_the_one_that_gets_there_first_is_picked():
    scores = {  # of 100 examples: a standard error of 0.04 at 0.8
        ("rl", 1e-3): ((0.5, 800), (0.7, 800)),
        ("rl", 3e-3): ((0.9, 100), (0.2, 100)),
        ("fst", 1e-3): ((0.8, 900), (0.8, 700)),
        ("fst", 3e-4): ((0.79, 600), (0.79, 700)),
        ("fst", 1e-4): ((0.7, 100), (0.7, 100)),
        ("sequential", 1e-3): ((0.8, 300),),
        ("sequential", 3e-4): ((0.8, 300),),
    }
    runs = [
        {"method": method, "lr": lr, "val_score_after": score, "settled_rollouts": cost, "val_examples": 100}
        for (method, lr), own in scores.items()
        for score, cost in own
    ]
    assert pick_rates(runs) == {"rl": 1e-3, "fst": 3e-4, "sequential": 3e-4}


def test_a_sweep_is_written_and_its_picks_are_used(tmp_path):
    jobs = sweep_jobs("programs/letters", tmp_path / "letters", ("rl", "gepa"), (3e-4, 1e-3), (100,), Common(300), {})
    assert [job.folder.name for job in jobs] == ["rl-lr0.0003-seed100", "rl-lr0.001-seed100"]
    for rate, job, curve in zip((3e-4, 1e-3), jobs, (RL_CURVE[:2], RL_CURVE), strict=True):
        write_run(job.folder, "rl", 100, curve, lr=rate)
    data = save_sweep(jobs, tmp_path, extra={"seeds": [100]})
    assert data["picked"] == {"rl": 1e-3}
    assert data["means"]["rl"] == [
        {"lr": 3e-4, "val_score_after": 0.5, "settled_rollouts": 100},
        {"lr": 1e-3, "val_score_after": 0.6, "settled_rollouts": 200},
    ]
    assert picked_sets(tmp_path / "sweep.json", ("rl", "gepa")) == {"rl": ["train.lr=0.001"]}
    with pytest.raises(UserError, match="no learning rate for fst"):
        picked_sets(tmp_path / "sweep.json", ("fst",))
