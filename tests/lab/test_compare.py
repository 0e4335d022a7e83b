import json

import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab import plan
from fst_optimizer.lab.compare import comparison_jobs, read_run, save_comparison
from fst_optimizer.lab.figures import draw_all
from fst_optimizer.lab.plan import Common, Job, check_jobs, variant_name
from fst_optimizer.lab.report import verdict_lines, write_report
from fst_optimizer.lab.sweep import pick_rates, picked_sets, save_sweep, sweep_jobs
from fst_optimizer.task_run import plan_run
from helpers.runs import FST_CURVE, GEPA_CURVE, RL_CURVE, write_run

EXTRA = {"command": "fst lab compare programs/letters --out out", "max_rollouts": 300, "sweep": {}}


@pytest.fixture
def fabricated(tmp_path):
    """Three methods, two seeds; FST's second seed stops short of RL's best."""
    root = tmp_path / "out" / "letters"
    folders = [
        write_run(root / "fst-seed0", "fst", 0, FST_CURVE, test=(0.1, 0.7)),
        write_run(root / "rl-seed0", "rl", 0, RL_CURVE, test=(0.1, 0.6)),
        write_run(root / "gepa-seed0", "gepa", 0, GEPA_CURVE, test=(0.1, 0.4)),
        write_run(root / "fst-seed1", "fst", 1, FST_CURVE[:2], test=(0.1, 0.6)),
        write_run(root / "rl-seed1", "rl", 1, RL_CURVE, test=(0.1, 0.6)),
        write_run(root / "gepa-seed1", "gepa", 1, GEPA_CURVE, test=(0.1, 0.5)),
    ]
    return root, [read_run(folder) for folder in folders]


def test_compare_json_says_who_reached_rls_best_and_at_what_cost(fabricated):
    root, runs = fabricated
    data = save_comparison(runs, root, extra=EXTRA)
    assert data == json.loads((root / "compare.json").read_text())
    assert data["val_examples"] == 100
    assert [best["rollouts"] for best in data["rl_best"]] == [200, 200]
    first, second = data["against_rl"]["fst"]["pairs"]
    assert (first["rollouts"], first["ratio"], first["kl_ratio"]) == (100, 0.5, pytest.approx(0.25))
    assert second["rollouts"] is None
    assert data["against_rl"]["gepa"]["reached"] == 0
    assert "rl" not in data["against_rl"]


def test_final_scores_have_means_over_seeds_and_differences_paired_by_seed(fabricated):
    data = save_comparison(fabricated[1], fabricated[0], extra=EXTRA)
    assert data["methods"]["fst"]["test_score_after"]["mean"] == pytest.approx(0.65)
    assert data["methods"]["fst"]["training_rollouts"]["mean"] == (100 + 50) / 2
    lead = data["differences"]["fst - gepa"]["test_score_after"]
    assert lead["mean"] == pytest.approx((0.3 + 0.1) / 2)
    # The two differences are 0.3 and 0.1: standard error 0.1, and t(0.975, 1) = 12.7062.
    assert lead["high"] == pytest.approx(0.2 + 1.27062, abs=1e-4)
    curve = data["runs"][0]["curve"]
    assert curve[1] == [50, 0.57, 0.05]
    assert data["runs"][0]["dir"] == "fst-seed0"


def test_a_comparison_without_rl_has_nothing_against_it(fabricated):
    root, runs = fabricated
    data = save_comparison([run for run in runs if run.method != "rl"], root, extra=EXTRA)
    assert data["rl_best"] is None and data["against_rl"] == {}


def test_both_figures_are_pictures(fabricated):
    root, runs = fabricated
    for path in draw_all(save_comparison(runs, root, extra=EXTRA), root):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_verdicts_follow_the_numbers(fabricated):
    root, runs = fabricated
    missed = verdict_lines(save_comparison(runs, root, extra=EXTRA))
    assert [line.split(":")[0] for line in missed] == ["aim missed", "aim missed", "aim met"]
    assert "only 1 of 2 seeds" in missed[0] and "20.0 points" in missed[2]
    first_seed = save_comparison([run for run in runs if run.seed == 0], root, extra=EXTRA)
    # Half of RL's rollouts are more than a third; a quarter of its KL is less than a half.
    assert [line.split(":")[0] for line in verdict_lines(first_seed)] == ["aim missed", "aim met", "aim met"]


def test_the_lead_over_gepa_has_the_same_sign_whichever_method_comes_first(fabricated):
    root, runs = fabricated
    data = save_comparison(sorted(runs, key=lambda run: run.method, reverse=True), root, extra=EXTRA)
    data["differences"] = {"gepa - fst": {"test_score_after": {"mean": -0.2, "low": -0.3, "high": -0.1, "n": 3}}}
    assert "20.0 points above GEPA alone on test (0.200 [0.100, 0.300], n = 3)" in verdict_lines(data)[-1]


def test_the_report_is_made_of_the_numbers(fabricated, tmp_path):
    root, runs = fabricated
    draw_all(save_comparison(runs, root, extra=EXTRA), root)
    page = tmp_path / "docs" / "results.md"
    write_report([root.parent], page)
    text = page.read_text()
    assert "fst lab compare programs/letters --out out" in text
    assert "Drop the last letter." in text
    assert "| fst | 0 | 0.580 | 200 | 0.4000 | 100 | 0.50 | 0.1000 | 0.25 |" in text
    assert "RL sees one number a rollout" in text
    for name in ("letters-score_by_rollouts.png", "letters-kl_by_score.png"):
        assert f"figures/{name}" in text and (page.parent / "figures" / name).exists()


def test_a_folder_without_a_comparison_cannot_be_reported(tmp_path):
    with pytest.raises(UserError, match=r"has no compare\.json: make one with fst lab compare"):
        write_report([tmp_path], tmp_path / "page.md")


# -- plans ------------------------------------------------------------------------------------------------------


def test_a_job_caps_the_rollouts_and_passes_its_settings_on():
    common = Common(500, ("train.steps_per_cycle=2",))
    jobs = comparison_jobs(
        "programs/letters", plan.Path("out/letters"), ("fst", "rl"), (3,), common, {"rl": ["train.lr=2e-3"]}
    )
    assert [job.folder.name for job in jobs] == ["fst-seed3", "rl-seed3"]
    arguments = " ".join(jobs[1].command())
    assert arguments.startswith(
        "fst_optimizer.cli.main compile programs/letters --run-dir out/letters/rl-seed3 --method rl --set seed=3"
    )
    assert "--set budget.max_rollouts=500 --set train.steps_per_cycle=2 --set train.lr=2e-3" in arguments
    assert arguments.endswith("--resume")


@pytest.mark.parametrize(
    ("task", "name"),
    [("programs/letters", "letters"), ("programs/letters:held-out", "held-out"), ("my.module/", "module")],
)
def test_a_tasks_folder_is_named_after_its_variant(task, name):
    assert variant_name(task) == name


def test_two_tasks_cannot_share_a_folder():
    with pytest.raises(UserError, match="would share the folder 'hard'"):
        plan.by_folder(["a:hard", "b:hard"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.parse_methods("fst,rll"), "did you mean 'rl'"),
        (lambda: plan.parse_methods(","), "names nothing"),
        (lambda: plan.parse_seeds("0,x"), "whole numbers like 0,1,2"),
        (lambda: plan.parse_rates("1e-3,fast"), "numbers like 3e-4"),
        (lambda: plan.by_method(["train.lr=1"]), r"METHOD\.NAME=VALUE"),
        (lambda: plan.by_method(["rl.train.lr"]), "NAME=VALUE"),
    ],
)
def test_lists_and_settings_are_checked(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path):
    write_run(tmp_path / "rl-seed0", "rl", 0, RL_CURVE)
    job = Job("programs/letters", "rl", 0, tmp_path / "rl-seed0", Common(300))
    with pytest.raises(
        UserError, match=r"holds another run \(.*budget.max_rollouts None, not 300.*\): give another --out"
    ):
        check_jobs([job])


def test_a_folder_with_the_same_run_is_taken_up(tmp_path):
    job = Job("programs/letters", "rl", 0, tmp_path / "rl-seed0", Common(300))
    config = plan.plan_run(job.request).settings.config.to_dict()
    write_run(job.folder, "rl", 0, RL_CURVE, config=config)
    check_jobs([job])


# -- the sweep --------------------------------------------------------------------------------------------------


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


def test_one_method_with_two_settings_is_told_apart_by_its_label(tmp_path):
    own = plan.by_method(["rl+own.train.credit=predictor"])
    common = plan.Common(100)
    jobs = comparison_jobs("programs/letters", tmp_path, plan.parse_methods("rl,rl+own"), (0,), common, own)
    assert [job.folder.name for job in jobs] == ["rl-seed0", "rl+own-seed0"]
    credits = [plan_run(job.request).settings.config.train.credit for job in jobs]
    assert credits == ["rollout", "predictor"]
    write_run(tmp_path / "rl+own-seed0", "rl", 0, RL_CURVE)
    assert read_run(tmp_path / "rl+own-seed0").method == "rl+own"
    with pytest.raises(UserError, match="give a label of letters"):
        plan.parse_methods("rl+a b")


def test_two_folders_of_one_name_cannot_share_a_page(fabricated, tmp_path):
    root, runs = fabricated
    save_comparison(runs, root, extra=EXTRA)
    other = tmp_path / "other" / "letters"
    other.mkdir(parents=True)
    (other / "compare.json").write_text((root / "compare.json").read_text())
    with pytest.raises(UserError, match="two folders are called 'letters'"):
        write_report([root, other], tmp_path / "page.md")


def test_a_method_that_was_looked_at_twice_has_ends_and_no_line(fabricated):
    from fst_optimizer.lab.figures import curves_by_method, only_ends

    root, runs = fabricated
    curves = curves_by_method(save_comparison(runs, root, extra=EXTRA))
    assert {method: only_ends(some) for method, some in curves.items()} == {
        "fst": False,  # one of its seeds has three points
        "rl": False,
        "gepa": True,
    }
