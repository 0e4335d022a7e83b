import json

import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab import methods, plan
from fst_optimizer.lab.cells import comparison_jobs, parse_seeds
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.plan import Common, Job, check_jobs, variant_name
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.task_run import plan_run
from helpers.runs import RL_CURVE, write_run


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
    assert "--resume" not in arguments


def test_a_run_that_was_begun_is_gone_on_with(tmp_path):
    job = Job("programs/letters", "fst", 0, tmp_path / "run", Common(100))
    assert "--resume" not in job.command()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert job.command()[-1] == "--resume"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("programs/letters", "letters"),
        ("programs/letters:held-out", "held-out"),
        ("my.module/", "module"),
        ("programs/letters:drop_first.sort-rotate+shown", "drop_first.sort-rotate+shown"),
        ("programs/letters:+shown", "letters+shown"),
        ("tasks/sums:..", "task"),
    ],
)
def test_a_tasks_folder_is_named_after_its_variant(task, name):
    assert variant_name(task) == name


def test_two_tasks_cannot_share_a_folder():
    with pytest.raises(UserError, match="would share the folder 'hard'"):
        plan.by_folder(["a:hard", "b:hard"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.parse_methods("fst,rll"), "did you mean 'rl'"),
        (lambda: methods.parse_methods(","), "names nothing"),
        (lambda: parse_seeds("0,x", 1), "whole numbers like 0,1,2"),
        (lambda: plan.parse_rates("1e-3,fast"), "numbers like 3e-4"),
        (lambda: methods.by_method(["train.lr=1"]), r"METHOD\.NAME=VALUE"),
        (lambda: methods.by_method(["rl.train.lr"]), "NAME=VALUE"),
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


def test_one_method_with_two_settings_is_told_apart_by_its_label(tmp_path):
    own = methods.by_method(["rl+own.train.credit=predictor"])
    common = plan.Common(100)
    jobs = comparison_jobs("programs/letters", tmp_path, methods.parse_methods("rl,rl+own"), (0,), common, own)
    assert [job.folder.name for job in jobs] == ["rl-seed0", "rl+own-seed0"]
    credits = [plan_run(job.request).settings.config.train.credit for job in jobs]
    assert credits == ["rollout", "predictor"]
    write_run(tmp_path / "rl+own-seed0", "rl", 0, RL_CURVE)
    assert read_run(tmp_path / "rl+own-seed0").method == "rl+own"
    with pytest.raises(UserError, match="give a label of letters"):
        methods.parse_methods("rl+a b")


def test_a_run_from_other_instructions_is_another_run(tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"second": "Sort the letters."}))
    job = Job("programs/letters", "fst+wrong", 0, tmp_path / "fst+wrong-seed0", Common(300), (), wrong)
    planned = plan_run(job.request)
    write_run(job.folder, "fst", 0, RL_CURVE, config=planned.settings.config.to_dict())
    path = job.folder / "config.json"
    with pytest.raises(UserError, match=r"holds another run \(instructions None, not .*Sort the letters"):
        check_jobs([job])
    texts = {**seed_texts(planned.task.build_program()), "second": "Sort the letters."}
    recorded = json.loads(path.read_text()) | {"program": {"instructions": texts, "instructions_given": True}}
    path.write_text(json.dumps(recorded))
    check_jobs([job])
