"""Rules x kinds x methods x seeds: which runs there are, where they lie, and what is shared."""

from pathlib import Path

import pytest

from fst_optimizer.config.overrides import assignments, flat
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.lab import cells, methods
from fst_optimizer.lab.cells import Own, comparison_cells, comparison_jobs, distinct_jobs, parse_seeds
from fst_optimizer.lab.compare import read_entry, save_comparison
from fst_optimizer.lab.plan import Common, check_jobs
from fst_optimizer.store.files import read_json
from fst_optimizer.task_run import plan_run
from helpers.runs import EXTRA, FST_CURVE, RL_CURVE, write_run

TASKS = ["programs/letters:dedupe-sort", "programs/letters:reverse-drop"]
OUT = Path("out")


def made(names, *, tasks=TASKS, seeds="0", kinds=(), own=None, out=OUT):
    numbers = parse_seeds(seeds, len(tasks))
    return comparison_cells(
        tasks, out, methods.parse_methods(names), numbers, Common(400), own or Own(), methods.parse_kinds(kinds or None)
    )


def test_methods_that_read_no_feedback_run_once_a_rule_and_are_in_every_kinds_comparison():
    found = made("fst,rl+own,sft,dspy-grpo", kinds="told,shown", tasks=TASKS[:1])
    assert [(cell.task, cell.folder.name, cell.rule, cell.kind) for cell in found] == [
        ("programs/letters:dedupe-sort+told", "dedupe-sort+told", "dedupe-sort", "told"),
        ("programs/letters:dedupe-sort+shown", "dedupe-sort+shown", "dedupe-sort", "shown"),
    ]
    for cell in found:
        (fst,), *blind = [entry.jobs for entry in cell.entries]
        assert (fst.task, fst.folder) == (cell.task, cell.folder / "fst-seed0")
        assert {job.task for (job,) in blind} == {"programs/letters:dedupe-sort"}
        assert [job.folder.as_posix() for (job,) in blind] == [
            f"out/dedupe-sort/{name}-seed0" for name in ("rl+own", "sft", "dspy-grpo")
        ]
    jobs = distinct_jobs(entry for cell in found for entry in cell.entries)
    assert len(jobs) == 2 + 3


def test_without_kinds_all_runs_of_a_task_lie_in_its_folder():
    (cell, _) = made("fst,rl")
    assert [job.folder.as_posix() for entry in cell.entries for job in entry.jobs] == [
        "out/dedupe-sort/fst-seed0",
        "out/dedupe-sort/rl-seed0",
    ]
    assert (cell.task, cell.kind) == (TASKS[0], None)


def test_a_seed_each_gives_every_rule_its_own():
    found = made("fst", seeds="each", kinds="told")
    assert [entry.jobs[0].folder.as_posix() for cell in found for entry in cell.entries] == [
        "out/dedupe-sort+told/fst-seed0",
        "out/reverse-drop+told/fst-seed1",
    ]
    assert parse_seeds("3,5", 2) == [(3, 5), (3, 5)]
    with pytest.raises(UserError, match="or each for one seed a task"):
        parse_seeds("every", 2)


def test_a_task_that_names_its_kind_is_not_given_another():
    with pytest.raises(UserError, match=r"dedupe-sort\+shown' names a kind of feedback and --kinds others"):
        made("fst", tasks=["programs/letters:dedupe-sort+shown"], kinds="told")
    with pytest.raises(UserError, match="--kinds has 'to ld'"):
        methods.parse_kinds("to ld")


def test_fst_with_one_prompt_needs_no_settings_by_hand_and_takes_more():
    own = Own({"fst+k1": ["fast.anchor_size=8"]})
    ((_, k1), _) = [[entry.jobs[0] for entry in cell.entries] for cell in made("fst,fst+k1", own=own)]
    config = plan_run(k1.request).settings.config
    assert (config.method, config.fast.population, config.fast.anchor_size) == ("fst", 1, 8)
    assert methods.built_in("fst@vllm+k1") == ("fast.population=1",)
    ((adaptive,),) = [[entry.jobs[0] for entry in cell.entries] for cell in made("fst+adaptive", tasks=TASKS[:1])]
    assert plan_run(adaptive.request).settings.config.adapts


@pytest.mark.parametrize("label", methods.LABELS)
def test_a_label_that_is_built_in_changes_what_it_says_and_nothing_else(label):
    ((with_label,),) = [[entry.jobs[0] for entry in cell.entries] for cell in made(label, tasks=TASKS[:1])]
    ((plain,),) = [[entry.jobs[0] for entry in cell.entries] for cell in made("fst", tasks=TASKS[:1])]
    had, has = (flat(plan_run(job.request).settings.config.to_dict()) for job in (plain, with_label))
    assert {name: value for name, value in has.items() if had[name] != value} == assignments(methods.LABELS[label])


def test_a_change_of_the_step_is_a_label_of_every_method_that_trains():
    made_of = {name: methods.built_in(name) for name in ("rl+epochs2", "fst+epochs2", "once@vllm+epochs2")}
    assert set(made_of.values()) == {("train.epochs=2",)}
    assert methods.built_in("gepa+epochs2") == methods.built_in("dspy-grpo+epochs2") == methods.built_in("rl+own") == ()
    names = ("rl", *(f"rl+{label}" for label in methods.STEP_LABELS))
    own = {"rl+target-kl": ["train.lr=8e-3"]}
    jobs = comparison_jobs("programs/letters:dedupe-sort", OUT, names, (0,), Common(400), own)
    plain, *others = [plan_run(job.request).settings.config.train.to_dict() for job in jobs]
    changed = [{name: value for name, value in one.items() if value != plain[name]} for one in others]
    assert changed == [
        {"epochs": 2},
        {"target_kl": 0.01, "lr": 8e-3},
        {"kl_coef": 0.02},
        {"entropy_floor": 0.1},
    ]


def test_a_change_of_the_search_is_a_label_of_every_method_with_fast_rounds():
    made_of = {name: methods.built_in(name) for name in ("gepa+paired", "fst+paired", "once@vllm+paired")}
    assert set(made_of.values()) == {("fast.accept=paired",)}
    assert methods.built_in("rl+paired") == methods.built_in("dspy-gepa+merge") == ()
    names = ("gepa", *(f"gepa+{label}" for label in methods.SEARCH_LABELS))
    jobs = comparison_jobs("programs/letters:dedupe-sort", OUT, names, (0,), Common(400), {})
    plain, *others = [plan_run(job.request).settings.config.fast.to_dict() for job in jobs]
    changed = [{name: value for name, value in one.items() if value != plain[name]} for one in others]
    assert changed == [{"parallel_proposals": 4}, {"accept": "paired"}, {"merge": True}]


def test_once_with_given_instructions_searches_and_reads_nothing():
    own = Own({"once": ["fast.once_rollouts=64"]}, {"once+given": Path("given.json")})
    assert own.reads_feedback("once") and own.reads_feedback("fst")
    assert not own.reads_feedback("once+given") and not own.reads_feedback("rl@vllm+own")
    (told, shown) = made("once,once+given", kinds="told,shown", tasks=TASKS[:1], own=own)
    ((once,), (given,)) = (entry.jobs for entry in shown.entries)
    assert (once.folder.parent.name, given.folder.parent.name) == ("dedupe-sort+shown", "dedupe-sort")
    assert (once.sets, given.sets) == (("fast.once_rollouts=64",), ("fast.once_rollouts=0",))
    assert "--instructions given.json" in " ".join(given.command())
    assert given == told.entries[1].jobs[0]


# -- the sweep --------------------------------------------------------------------------------------------------------


def test_the_sweep_is_the_plain_method_and_four_changes_of_it():
    points = methods.sweep_points(FSTConfig().with_values({"train.lr": 2e-3, "rollout.batch_size": 8}))
    assert points == {
        "entropy": ("train.entropy_coef=0.01",),
        "kl": ("train.kl_coef=0.02",),
        "groups": ("rollout.group_size=16", "rollout.batch_size=4"),
        "lr": ("train.lr=0.001",),
    }
    own = {"rl": ["train.lr=4e-3"], "rl+sweep": ["train.warmup_steps=3"]}
    jobs = comparison_jobs("programs/letters:dedupe-sort", OUT, ("rl", "rl+sweep"), (7,), Common(400), own)
    assert [job.folder.name for job in jobs] == [
        "rl-seed7",
        "rl+sweep-entropy-seed7",
        "rl+sweep-kl-seed7",
        "rl+sweep-groups-seed7",
        "rl+sweep-lr-seed7",
    ]
    assert jobs[-1].sets == ("train.lr=4e-3", "train.warmup_steps=3", "train.lr=0.002")
    assert all("--method rl " in " ".join(job.command()) + " " for job in jobs)
    with pytest.raises(UserError, match="only rl has a sweep"):
        methods.parse_methods("fst+sweep")


def test_the_best_of_a_sweep_by_validation_is_reported_with_all_that_it_took(tmp_path):
    (cell,) = made("fst,rl+sweep", tasks=TASKS[:1], kinds="shown", out=tmp_path)
    fst, sweep = cell.entries
    write_run(fst.jobs[0].folder, "fst", 0, FST_CURVE, task=cell.task)
    higher = [*RL_CURVE[:-1], (0, 300, 0.9, 0.8)]
    for job, curve, test in zip(sweep.jobs[:3], (RL_CURVE, higher, higher), (0.95, 0.7, 0.8), strict=True):
        write_run(job.folder, "rl", 0, curve, test=(0.1, test), wall_s=20.0)
    best = read_entry(sweep)
    assert (best.method, best.folder.name) == ("rl+sweep", "rl+sweep-entropy-seed0")
    data = save_comparison([read_entry(fst), best], cell.folder, extra=EXTRA)
    assert (data["runs"][1]["dir"], data["runs"][1]["test_score_after"]) == (
        "../dedupe-sort/rl+sweep-entropy-seed0",
        0.7,
    )
    points = data["runs"][1]["sweep"]
    assert [(point["method"], point["picked"], point["val_score_after"]) for point in points] == [
        ("rl", False, 0.6),
        ("rl+sweep-entropy", True, 0.9),
        ("rl+sweep-kl", False, 0.9),
        ("rl+sweep-groups", False, None),
        ("rl+sweep-lr", False, None),
    ]
    assert points[1]["sets"] == ["train.entropy_coef=0.01"]
    assert points[1]["wall_s"] == 20.0
    assert data["runs"][0]["sweep"] is None and data["rl_best"] is None
    assert read_json(cell.folder / "compare.json") == data


# -- before anything runs ---------------------------------------------------------------------------------------------


def test_a_wrong_rule_and_sft_without_answers_are_refused_before_anything_runs(tmp_path):
    common = Common(100)
    wrong = comparison_jobs("programs/letters:nope", tmp_path, ("fst",), (0,), common, {})
    with pytest.raises(UserError, match="nope"):
        check_jobs(wrong)
    silent = comparison_jobs("programs/star_graph", tmp_path, ("sft",), (0,), common, {})
    with pytest.raises(UserError, match="learns from right answers, and the task 'programs/star_graph' tells none"):
        check_jobs(silent)


def test_instructions_go_to_the_runs_of_their_method_alone():
    files = methods.files_by_method(["fst+wrong=wrong.json"], ("fst", "fst+wrong"))
    (cell, _) = made("fst,fst+wrong", own=Own(instructions=files))
    assert [entry.jobs[0].instructions for entry in cell.entries] == [None, Path("wrong.json")]
    with pytest.raises(UserError, match=r"give METHOD=FILE.json, the method one of fst, fst\+wrong"):
        methods.files_by_method(["rl=wrong.json"], ("fst", "fst+wrong"))


def test_what_a_kind_is_called_is_read_off_the_task():
    assert cells.with_kind("programs/letters", "shown") == "programs/letters:+shown"
    assert cells.with_kind("programs/letters:a.b-c", "shown") == "programs/letters:a.b-c+shown"
