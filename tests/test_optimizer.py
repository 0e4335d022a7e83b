import asyncio
import json
import shutil
from itertools import pairwise

import dspy
import pytest
import torch
from dspy.lm15 import RateLimitError
from dspy.utils.dummies import DummyLM

from fst_optimizer import FST, Policy, UserError, load
from fst_optimizer.errors import MetricError
from fst_optimizer.store.files import read_json
from fst_optimizer.testing import make_tiny_model
from helpers.toy import (
    TRAIN,
    VAL,
    Program,
    answer,
    assert_same_run,
    examples,
    frozen,
    metric,
    optimizer,
    run_toy,
    said,
    student_of,
    undated_result,
    untimed_metrics,
)


@pytest.fixture
def policy(scripted):
    return scripted(answer)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """One run from beginning to end, looked at by many tests: its policy, student, program and directory."""
    from fst_optimizer.testing import ScriptedEngine

    policy = Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, answer))
    student, run_dir = student_of(policy), tmp_path_factory.mktemp("runs") / "one"
    before = student.dump_state()
    heard = []
    compiled = optimizer(run_dir, callbacks=[heard.append]).compile(student, trainset=TRAIN, valset=VAL)
    return dspy.Example(policy=policy, student=student, before=before, run_dir=run_dir, compiled=compiled, heard=heard)


# -- a run and what it leaves -------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_that_other_programs_read(finished):
    names = {path.relative_to(finished.run_dir).as_posix() for path in finished.run_dir.rglob("*") if path.is_file()}
    assert names >= {
        "config.json",
        "state.json",
        "metrics.jsonl",
        "program.json",
        "result.json",
        "population/cycle-000000.json",
        "population/cycle-000001.json",
        "rollouts/cycle-000000.jsonl",
    }
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".bin", ".tmp"))]


def test_the_result_agrees_with_the_metrics(finished, lines):
    result, metrics = read_json(finished.run_dir / "result.json"), lines(finished.run_dir / "metrics.jsonl")
    steps = [line for line in metrics if line["kind"] == "step"]
    evals = [line for line in metrics if line["kind"] == "eval"]
    assert (result["task"], result["method"], result["ended"]) == ("Program", "fst", "done")
    assert (result["cycles"], result["steps"]) == (2, 4) == (2, len(steps))
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    # Both fast rounds found a new leader, which is validated at once; the cycle's end validates what was trained.
    cycle = ["fast", "eval", "eval"]
    assert [line["kind"] for line in metrics if line["kind"] != "step"] == ["eval", *cycle, *cycle]
    assert result["rollouts"] == metrics[-1]["rollouts"]
    assert result["rollouts"]["slow"] == 4 * 2 * 4
    assert result["val_score_before"] == evals[0]["score"]
    assert result["val_score_after"] == max(line["score"] for line in evals)
    assert result["test_score_before"] is result["test_score_after"] is None
    assert set(result["candidate"]) == {"first", "second"}
    counts = [line["rollouts"] for line in metrics]
    assert all(a[kind] <= b[kind] for a, b in pairwise(counts) for kind in a)


def test_every_step_publishes_a_version_when_it_updates(finished, lines):
    versions, version = [], 0
    for line in lines(finished.run_dir / "metrics.jsonl"):
        if line["kind"] == "step":
            version += line["updated"]
            versions.append(line["policy_version"])
            assert line["policy_version"] == version
    assert finished.policy.engine.published == list(range(1, version + 1))
    assert version > 0, "no group had any signal: the test would show nothing"


def test_callbacks_hear_every_line_and_the_progress(finished, lines):
    told = [data for data in finished.heard if data["kind"] in ("fast", "step", "eval")]
    assert json.loads(json.dumps(told)) == lines(finished.run_dir / "metrics.jsonl")
    assert {data["phase"] for data in finished.heard if data["kind"] == "progress"} == {"fast", "slow", "eval", "kl"}


def test_the_student_is_not_changed(finished):
    assert finished.student.dump_state() == finished.before
    assert finished.student.first.lm is finished.policy.lm


def test_the_compiled_program_carries_the_best_pair_and_works(finished):
    compiled, result = finished.compiled, read_json(finished.run_dir / "result.json")
    assert {name: one.signature.instructions for name, one in compiled.named_predictors()} == result["candidate"]
    assert {one.lm.engine.version for one in compiled.predictors()} == {result["policy_version"]}
    assert compiled(question="q").answer in ("right", "wrong")
    assert compiled.detailed_results.result == result
    assert compiled.detailed_results.best.score == result["val_score_after"]
    assert compiled._compiled


def test_the_best_versions_adapter_is_on_disk(finished):
    version = read_json(finished.run_dir / "result.json")["policy_version"]
    assert not version or (finished.run_dir / "policy" / f"policy-{version:06d}" / "adapter_model.safetensors").exists()
    state = read_json(finished.run_dir / "state.json")["state"]
    named = {f"policy-{v:06d}" for v in (state["policy_version"], state["best"]["policy_version"]) if v}
    kept = {path.name for path in (finished.run_dir / "policy").iterdir()}
    assert named <= kept
    assert len(kept) <= 3  # and the weights before, to fall back on


def test_populations_hold_scores_on_the_anchor_and_lineage(finished):
    for cycle in (0, 1):
        population = read_json(finished.run_dir / "population" / f"cycle-{cycle:06d}.json")
        assert 1 <= len(population["candidates"]) <= 2
        for candidate in population["candidates"]:
            assert candidate["origin"] in ("seed", "reflection")
            assert len(population["scores"][candidate["id"]]) == 3


def test_a_finished_run_is_loaded_with_its_lm(finished, tiny_model):
    program = load(finished.run_dir, program=Program(), model=str(tiny_model))
    result = read_json(finished.run_dir / "result.json")
    assert {name: one.signature.instructions for name, one in program.named_predictors()} == result["candidate"]
    assert {one.lm.engine.version for one in program.predictors()} == {result["policy_version"]}
    loaded = program.first.lm.engine.policy
    try:
        if result["policy_version"]:
            ours = finished.policy.tensors(result["policy_version"])
            theirs = loaded.tensors(result["policy_version"])
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert len(program.first.lm("hi", max_tokens=2)) == 1
    finally:
        loaded.close()


def test_loading_a_run_of_no_task_asks_for_the_program(finished):
    with pytest.raises(UserError, match=r"pass program=, a fresh instance of your program"):
        load(finished.run_dir)


def test_a_run_is_not_loaded_onto_another_model(finished, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the one that the run was made with"):
        load(finished.run_dir, program=Program(), model=str(other))


def test_loading_a_directory_without_a_result_says_so(tmp_path):
    with pytest.raises(UserError, match="no such file; is this a run directory"):
        load(tmp_path, program=Program())


def test_the_compiled_program_is_saved_and_loaded_without_its_lm(finished, tmp_path):
    finished.compiled.save(str(tmp_path / "program.json"))
    again = Program()
    again.load(str(tmp_path / "program.json"))
    assert again.first.lm is None
    assert again.first.signature.instructions == finished.compiled.first.signature.instructions
    again.set_lm(finished.policy.lm)
    assert again(question="q").answer in ("right", "wrong")


def test_a_finished_runs_directory_is_refused_before_anything_is_asked(finished, policy):
    for resume in (False, True):
        with pytest.raises(UserError, match="holds a finished run"):
            optimizer(finished.run_dir, resume=resume).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    assert policy.engine.requests == []


def test_a_compiled_program_is_compiled_again_from_where_it_is(policy, tmp_path):
    first = optimizer(tmp_path / "one", values={"budget.max_cycles": 1}).compile(
        student_of(policy), trainset=TRAIN, valset=VAL
    )
    start = first.detailed_results.best
    second = optimizer(tmp_path / "two", values={"budget.max_cycles": 1}).compile(first, trainset=TRAIN, valset=VAL)
    before = read_json(tmp_path / "two" / "population" / "cycle-000000.json")
    assert start.candidate.id in {parent for one in before["candidates"] for parent in (one["id"], *one["parents"])}
    assert second.detailed_results.result["val_score_before"] == start.score
    assert second.detailed_results.result["val_score_after"] >= start.score
    assert second(question="q").answer in ("right", "wrong")


def test_a_test_set_is_scored_before_and_after_and_nothing_is_chosen_on_it(policy, tmp_path):
    compiled = optimizer(tmp_path / "run", values={"budget.max_cycles": 1}, testset=examples(3, start=200)).compile(
        student_of(policy), trainset=TRAIN, valset=VAL
    )
    result = compiled.detailed_results.result
    assert 0 <= result["test_score_before"] <= 1
    assert 0 <= result["test_score_after"] <= 1


# -- the methods --------------------------------------------------------------------------------------------------


def test_once_is_sequential_with_another_number(scripted, tmp_path):
    capped = {"budget.max_rollouts": 48, "budget.max_cycles": 12}
    values = {
        "sequential": {"method": "sequential", **capped},
        "once": {"method": "once", "fast.once_rollouts": 24, **capped},
    }
    for method, own in values.items():
        result = run_toy(tmp_path / method, scripted(answer), values=own)
        assert result["method"] == method and result["rollouts"]["slow"] > 0 < result["rollouts"]["fast"] <= 24
    assert untimed_metrics(tmp_path / "once") == untimed_metrics(tmp_path / "sequential")


def test_once_without_a_search_trains_under_the_programs_own_instructions_as_rl_does(scripted, tmp_path):
    for method in ("once", "rl"):
        values = {"method": method, "fast.once_rollouts": 0}
        result = run_toy(tmp_path / method, scripted(answer), values=values)
        assert result["rollouts"]["fast"] == result["reflection_calls"] == 0
        assert set(result["candidate"].values()) == {"Answer."}
    assert untimed_metrics(tmp_path / "once") == untimed_metrics(tmp_path / "rl")


def test_gepa_is_done_when_the_reflector_has_nothing_new_and_shows_what_it_leaves(scripted, tmp_path, lines, capsys):
    values = {"method": "gepa", "budget.max_rollouts": 500, "budget.max_cycles": 40}
    result = run_toy(tmp_path / "run", scripted(answer), values=values)
    why = "nothing new to try in 2 fast rounds in a row"
    assert (result["ended"], result["cap"]) == ("done", None) and result["search_over"].startswith(why)
    spent = result["rollouts"]["fast"]
    assert spent < 250 and result["unused_rollouts"] == 500 - spent
    told = [line["search_over"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "fast"]
    assert told[-1] == result["search_over"] and not any(told[:-1])
    shown = capsys.readouterr().err
    assert f"no more fast rounds: {why}" in shown
    assert f"; {500 - spent} rollouts of the cap not used" in shown


def test_sequential_trains_on_what_its_search_leaves(scripted, tmp_path, lines):
    values = {"method": "sequential", "budget.max_rollouts": 100, "budget.max_cycles": 40}
    result = run_toy(tmp_path / "run", scripted(answer), values=values)
    assert result["search_over"] and result["rollouts"]["fast"] < 50
    assert result["unused_rollouts"] < 8 <= result["rollouts"]["slow"]  # less than a step
    kinds = [line["kind"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert "fast" not in kinds[kinds.index("step") :]


def test_a_search_that_is_resumed_is_over_when_the_whole_one_is(scripted, tmp_path):
    values = {"method": "gepa", "budget.max_rollouts": 120, "budget.max_cycles": 40}
    run_toy(tmp_path / "whole", scripted(answer), values=values)
    cycle = 1 + sum(line["kind"] == "fast" for line in untimed_metrics(tmp_path / "whole")) - 2
    with pytest.raises(KeyboardInterrupt):
        run_toy(
            tmp_path / "run", scripted(answer), values=values, callbacks=[interrupt_at("phase", cycle=cycle, number=2)]
        )
    run_toy(tmp_path / "run", scripted(answer), values=values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("times", [1, 9])
def test_what_a_judge_in_the_program_loses_is_asked_again_and_else_left_out_and_told(scripted, tmp_path, lines, times):
    """An LM in the program fails on one of four validation examples, once or always."""
    failed = []

    def judge(request):
        if "q101" in request.messages[-1].text and len(failed) < times:
            failed.append(1)
            raise RateLimitError("slow down")
        return said(True)

    lm, _ = frozen("hosted_vllm/judge", answer=judge)
    values = {"method": "gepa", "budget.max_cycles": 1, "fast.max_proposals": 0}
    compiled = optimizer(tmp_path / "run", values=values).compile(
        student_of(scripted(answer), first=lm), trainset=TRAIN, valset=VAL
    )
    result = compiled.detailed_results.result
    first = next(line for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval")
    scores = compiled.detailed_results.best.scores
    assert first["score"] == sum(scores.values()) / len(scores) >= 0.5  # the judged half is always right
    assert result["rollouts"]["eval"] == 5
    if times == 1:
        assert (len(scores), first["lost"], result["alarms"]) == (4, 0, [])
    else:
        assert (sorted(scores), first["lost"]) == (["val-0", "val-2", "val-3"], 1)
        (alarm,) = result["alarms"]
        assert alarm.startswith(
            "lost: the validation left out 1 of 4 examples, on which the engine or another LM failed"
        )


@pytest.mark.parametrize("method", ["rl", "gepa", "sequential"])
def test_each_method_is_the_cycle_with_parts_left_out(policy, tmp_path, lines, method):
    values = {"method": method, "budget.max_rollouts": 48, "budget.max_cycles": 12}
    compiled = optimizer(tmp_path / "run", values=values).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    result, metrics = compiled.detailed_results.result, lines(tmp_path / "run" / "metrics.jsonl")
    kinds = [line["kind"] for line in metrics]
    assert result["method"] == method
    assert result["rollouts"]["fast"] + result["rollouts"]["slow"] <= 48
    assert ("fast" in kinds) == (method != "rl")
    assert ("step" in kinds) == (method != "gepa")
    if method == "rl":
        assert set(result["candidate"].values()) == {"Answer."}
    if method == "gepa":
        assert (result["policy_version"], result["kl_to_base"]) == (0, 0)
    if method == "sequential":
        assert result["rollouts"]["fast"] <= 24
        assert kinds.index("fast") < kinds.index("step")
        assert "fast" not in kinds[kinds.index("step") :]


def test_a_metric_below_zero_still_has_a_best_pair(policy, tmp_path):
    compiled = optimizer(
        tmp_path / "run", metric=lambda example, prediction: -5.0, values={"method": "gepa", "budget.max_cycles": 1}
    ).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    assert compiled.detailed_results.result["val_score_before"] == -5.0


def test_another_lm_in_the_program_stays_where_it_is(policy, tmp_path):
    student = student_of(policy)
    student.second.lm = DummyLM([{"answer": "right"}] * 500)
    compiled = optimizer(tmp_path / "run", values={"method": "gepa", "budget.max_cycles": 1}).compile(
        student, trainset=TRAIN, valset=VAL
    )
    assert compiled.second.lm is student.second.lm
    assert compiled(question="q").answer == "right"


def test_an_lm_of_the_users_context_is_trained(policy, tmp_path):
    with dspy.context(lm=policy.lm):
        compiled = optimizer(tmp_path / "run", values={"method": "gepa", "budget.max_cycles": 1}).compile(
            Program(), trainset=TRAIN, valset=VAL
        )
    assert compiled(question="q").answer in ("right", "wrong"), "outside of the context as well"


@pytest.mark.parametrize("how", ["directly", "to_thread"])
def test_compile_works_inside_a_running_event_loop(policy, tmp_path, how):
    fst = optimizer(tmp_path / "run", values={"method": "gepa", "budget.max_cycles": 1})

    def compile_():
        return fst.compile(student_of(policy), trainset=TRAIN, valset=VAL)

    async def main():
        return compile_() if how == "directly" else await asyncio.to_thread(compile_)

    assert asyncio.run(main())(question="q").answer in ("right", "wrong")


# -- interrupted and resumed --------------------------------------------------------------------------------------


def interrupt_at(kind, **where):
    def callback(data):
        if data["kind"] == kind and all(data.get(name) == value for name, value in where.items()):
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("process", ["the same process", "a new process"])
@pytest.mark.parametrize(
    "where",
    [
        {"kind": "step", "step": 1},
        {"kind": "step", "step": 2},
        {"kind": "step", "step": 3},
        {"kind": "progress", "phase": "slow", "done": 5},
    ],
)
def test_a_resumed_run_ends_as_if_it_had_never_stopped(finished, scripted, tmp_path, lines, where, process):
    policy = scripted(answer)
    with pytest.raises(KeyboardInterrupt):
        optimizer(tmp_path / "run", callbacks=[interrupt_at(**where)]).compile(
            student_of(policy), trainset=TRAIN, valset=VAL
        )
    with pytest.raises(UserError, match="unfinished run: resume it"):
        optimizer(tmp_path / "run").compile(student_of(policy), trainset=TRAIN, valset=VAL)
    if process == "a new process":
        policy = scripted(answer)
    optimizer(tmp_path / "run", resume=True).compile(student_of(policy), trainset=TRAIN, valset=VAL)

    whole, resumed = (read_json(run / "state.json")["state"] for run in (finished.run_dir, tmp_path / "run"))
    assert resumed == whole
    assert undated_result(finished.run_dir) == undated_result(tmp_path / "run")
    without_time = [
        [{**line, "time_s": 0, "step_s": 0} for line in lines(run / "metrics.jsonl")]
        for run in (finished.run_dir, tmp_path / "run")
    ]
    assert without_time[0] == without_time[1]


def test_a_run_is_not_resumed_with_other_settings_or_data(policy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        optimizer(tmp_path / "run", callbacks=[interrupt_at("fast")]).compile(
            student_of(policy), trainset=TRAIN, valset=VAL
        )
    asked = len(policy.engine.requests)
    with pytest.raises(UserError, match=r"config.train.lr: 0.01 -> 0.5"):
        optimizer(tmp_path / "run", resume=True, values={"train.lr": 0.5}).compile(
            student_of(policy), trainset=TRAIN, valset=VAL
        )
    with pytest.raises(UserError, match=r"data.train"):
        optimizer(tmp_path / "run", resume=True).compile(student_of(policy), trainset=TRAIN[1:], valset=VAL)
    assert len(policy.engine.requests) == asked


# -- what bad input gets: a UserError, and nothing was generated --------------------------------------------------


def two_policies(policy, other):
    program = student_of(policy)
    program.second.lm = other.lm
    return program


@pytest.mark.parametrize(
    ("student", "data", "named"),
    [
        (lambda p, o: student_of(p), {"trainset": []}, "trainset is empty"),
        (lambda p, o: student_of(p), {"valset": []}, "valset is empty"),
        (lambda p, o: student_of(p), {"trainset": [{"question": "a"}]}, "is dict: give a dspy.Example"),
        (lambda p, o: student_of(p), {"teacher": Program()}, "none of the teacher's predictors"),
        (lambda p, o: "program", {}, "student is str"),
        (lambda p, o: dspy.Module(), {}, "has no dspy.Predict"),
        (lambda p, o: Program(), {}, "have no LM: call student.set_lm"),
        (lambda p, o: two_policies(DummyPolicy(), DummyPolicy()), {}, "none of the student's LMs is a policy"),
        (two_policies, {}, "the student uses 2 trainable policies"),
    ],
)
def test_a_wrong_student_or_wrong_data_cost_nothing(policy, scripted, tmp_path, student, data, named):
    other = scripted(answer)
    with pytest.raises(UserError, match=named):
        optimizer(tmp_path / "run").compile(student(policy, other), **{"trainset": TRAIN, "valset": VAL, **data})
    assert policy.engine.requests == other.engine.requests == []
    assert not (tmp_path / "run").exists()


class DummyPolicy:
    def __init__(self):
        self.lm = DummyLM([])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"metric": None}, "metric is None"),
        ({"metric": lambda example: 1.0}, "takes neither two arguments"),
        ({"metric": metric, "auto": "lite"}, r"auto is 'lite'"),
        ({"metric": metric, "config": {"trian": {}}}, r"unknown key 'trian'; did you mean 'train'\?"),
        ({"metric": metric, "config": {"method": "ppo"}}, "method is 'ppo'"),
        ({"metric": metric, "config": {"rollout": {"group_size": 1}}}, "rollout.group_size is 1"),
        ({"metric": metric, "config": {"rollout": {"group_size": 6}}}, "must be divisible by fast.population"),
        ({"metric": metric, "config": 3}, "config is 3"),
        ({"metric": metric, "resume": True}, "resume is True and run_dir is None"),
        ({"metric": metric, "testset": []}, "testset is empty"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_made(arguments, named):
    with pytest.raises(UserError, match=named):
        FST(**arguments)


def test_shared_examples_are_a_warning_that_points_at_the_users_line(policy, tmp_path):
    with pytest.warns(UserWarning, match=r"share 2 example\(s\)") as caught:
        optimizer(tmp_path / "run", values={"method": "gepa", "budget.max_cycles": 1}).compile(
            student_of(policy), trainset=TRAIN, valset=TRAIN[:2]
        )
    assert {warning.filename for warning in caught if "share" in str(warning.message)} == {__file__}


@pytest.mark.parametrize(
    ("bad", "error", "named"),
    [
        (lambda example, prediction: float("nan"), UserError, "on example val-0: return a finite number"),
        (lambda example, prediction: "good", UserError, "on example val-0"),
        (lambda example, prediction: example.gold, MetricError, "raised on example val-0"),
    ],
)
def test_a_metric_that_gives_no_number_stops_at_the_first_rollout(policy, tmp_path, bad, error, named):
    with pytest.raises(error, match=named):
        optimizer(tmp_path / "run", metric=bad, values={"rollout.num_threads": 1}).compile(
            student_of(policy), trainset=TRAIN, valset=VAL
        )
    assert len(policy.engine.requests) <= 2 * len(VAL)


# -- what a policy refuses ----------------------------------------------------------------------------------------


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_an_unknown_engine_is_refused(tiny_model):
    with pytest.raises(UserError, match="engine is 'troch': did you mean 'torch'"):
        Policy(tiny_model, engine="troch")


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "no-such-model"])
def test_a_missing_model_is_refused(name):
    with pytest.raises(UserError, match="no such folder; give a model's folder"):
        Policy(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json"):
        Policy(tmp_path)


def test_a_model_without_chat_template_is_refused(model_copy):
    (model_copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template; take the instruct variant"):
        Policy(model_copy)


def test_a_tokenizer_of_another_model_is_refused(model_copy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(50)])
    tokenizer.save_pretrained(model_copy)
    with pytest.raises(UserError, match=r"its tokenizer has .* tokens and its embedding only"):
        Policy(model_copy)
