"""What a comparison will take, by runs whose seconds are known."""

from fst_optimizer.lab.cells import Own, comparison_cells, distinct_jobs
from fst_optimizer.lab.estimate import estimates, plan_table, plan_words
from fst_optimizer.lab.plan import Common
from helpers.runs import RL_CURVE, write_run


def test_what_is_left_is_reckoned_by_method_and_kind(tmp_path):
    tasks = ["programs/letters:a", "programs/letters:b"]
    made = comparison_cells(tasks, tmp_path, ("fst", "gepa", "rl"), [(0,), (1,)], Common(300), Own(), ("told", "shown"))
    jobs = distinct_jobs(entry for cell in made for entry in cell.entries)
    seconds = {"a+told/fst-seed0": 100.0, "a+shown/fst-seed0": 300.0, "b+told/fst-seed1": 120.0, "a/rl-seed0": 80.0}
    for job in jobs:
        if job.label in seconds:
            write_run(job.folder, job.method, job.seed, RL_CURVE, wall_s=seconds[job.label])
    found = {(one.kind, one.method): one for one in estimates(jobs)}
    # gepa: told and shown, two rules each, none finished. fst told: both. fst shown: one of two. rl: one of two.
    assert (found["told", "fst"].seconds, found["told", "fst"].left_s) == (110.0, 0.0)
    assert (found["shown", "fst"].runs, found["shown", "fst"].finished, found["shown", "fst"].left_s) == (2, 1, 300.0)
    assert (found["", "rl"].runs, found["", "rl"].left_s) == (2, 80.0)
    assert found["told", "gepa"].left_s is None
    words = plan_words(list(found.values()), at_once=2)
    assert words.startswith("10 runs, 4 finished; what is left takes about 3:10, 2 at a time, and 4 runs of methods")
    assert "none is finished yet: gepa" in words
    head, rows = plan_table(list(found.values()))
    assert len(head) == len(rows[0]) == 6


def test_a_kind_that_has_no_finished_run_takes_what_the_method_takes_elsewhere(tmp_path):
    made = comparison_cells(["programs/letters:a"], tmp_path, ("fst",), [(0,)], Common(300), Own(), ("told", "scored"))
    told, scored = distinct_jobs(entry for cell in made for entry in cell.entries)
    write_run(told.folder, "fst", 0, RL_CURVE, wall_s=90.0)
    assert [one.left_s for one in estimates([told, scored])] == [0.0, 90.0]
