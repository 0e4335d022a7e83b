"""Whom a run of a task asks for instructions: what was asked for, what it began with, what the task says."""

import json
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import dspy
import pytest

from fst_optimizer.config.overrides import Settings
from fst_optimizer.errors import UserError
from fst_optimizer.lab.plan import Common, Job, check_jobs
from fst_optimizer.store.files import read_json, write_json
from fst_optimizer.task_run import RunPlan, RunRequest, Sizes, plan_run, reflection_lm_of, reflection_name
from fst_optimizer.tasks import Task
from helpers.runs import RL_CURVE, write_run

POLICY = SimpleNamespace(base_lm="the policy's base")


def plan_of(function=None, recorded=None, variant=None):
    """The plan of a task with this `reflection_lm`, resuming a run that recorded a name."""
    module = ModuleType("own")
    if function is not None:
        module.reflection_lm = function
    before = None if recorded is None else {"policy": {"model": "m"}, "program": {"reflection_lm": recorded or None}}
    return RunPlan(Task("own", module, variant), Settings(), Sizes(), before)


def chosen(name=None, **plan):
    """The reflection LM, or its model's name."""
    found = reflection_lm_of(RunRequest("own", None, reflection_lm=name), plan_of(**plan))(POLICY)
    return getattr(found, "model", found)


def test_the_option_wins_over_the_task_and_the_task_over_none():
    assert chosen() is None
    assert chosen(function=lambda: "hosted_vllm/own") == "hosted_vllm/own"
    assert chosen(function=lambda: dspy.LM("openai/own", api_key="none")) == "openai/own"
    assert chosen("hosted_vllm/asked", function=lambda: "hosted_vllm/own") == "hosted_vllm/asked"
    assert chosen("policy") == chosen(function=lambda: "policy") == POLICY.base_lm
    assert chosen(function=lambda: None) is None


def test_a_task_may_choose_by_variant_or_not_care():
    assert chosen(function=lambda variant: f"hosted_vllm/{variant}", variant="loud") == "hosted_vllm/loud"
    assert chosen(function=lambda: "hosted_vllm/own", variant="loud") == "hosted_vllm/own"
    with pytest.raises(UserError, match=r"reflection_lm is 3: give a dspy.LM, or None"):
        chosen(function=lambda: 3)


def test_a_resumed_run_keeps_its_own():
    own = dspy.LM("hosted_vllm/own", temperature=0.7)
    request = RunRequest("own", None, resume=True)
    assert reflection_lm_of(request, plan_of(lambda: own, recorded="hosted_vllm/own"))(POLICY) is own
    assert chosen(function=lambda: own, recorded="hosted_vllm/asked") == "hosted_vllm/asked"
    assert chosen(recorded="policy") == POLICY.base_lm
    assert chosen(function=lambda: own, recorded="") is None  # it began without one
    assert chosen("hosted_vllm/new", recorded="hosted_vllm/asked") == "hosted_vllm/new"  # and is refused for that


def test_the_extractive_reflector_can_be_asked_for_over_the_tasks_own():
    assert chosen("extractive", function=lambda: "hosted_vllm/own") is None
    assert chosen(function=lambda: "extractive") is None
    request = RunRequest("own", None, reflection_lm="extractive")
    assert reflection_name(request, plan_of(lambda: "hosted_vllm/own")) is None


LETTERS = "programs/letters:pipeline"


def plan_with(tmp_path, content, **request):
    path = tmp_path / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return plan_run(RunRequest(LETTERS, tmp_path / "run", instructions=path, **request))


def test_instructions_are_read_from_a_file_and_may_be_of_some_predictors(tmp_path):
    assert plan_with(tmp_path, {"second": "Sort."}).instructions == {"second": "Sort."}
    assert plan_run(RunRequest(LETTERS, tmp_path / "run")).instructions is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "given.json: not readable as JSON"),
        ("[]", "given.json: holds list, not an object"),
        ({}, "given.json is empty: give an instruction for one of first, second"),
        ({"frist": "Sort."}, "given.json names 'frist': the program has no such predictor; did you mean 'first'?"),
        ({"first": 3}, "given.json: the instruction of first is 3: give a text"),
        ({"first": " "}, "given.json: the instruction of first is ' ': give a text"),
        ('{"first": "\\ud800"}', "the instruction of first is '\\ud800': give a text"),
    ],
)
def test_wrong_instructions_are_refused_before_anything_is_loaded(tmp_path, content, message):
    with pytest.raises(UserError) as raised:
        plan_with(tmp_path, content)
    assert message in str(raised.value)


def test_a_resumed_run_goes_on_from_the_instructions_that_it_was_given(tmp_path):
    run = write_run(tmp_path / "run", "once", 0, RL_CURVE, task=LETTERS)
    recorded = read_json(run / "config.json")
    recorded["policy"] = {"model": "letters", "engine": "torch"}
    own = {"instructions": {"first": "Sort.", "second": "Reverse."}}
    for program, expected in ((own, None), ({**own, "instructions_given": True}, own["instructions"])):
        write_json(run / "config.json", {**recorded, "program": program})
        assert plan_run(RunRequest(LETTERS, run, resume=True)).instructions == expected
    write_json(run / "config.json", {**recorded, "program": {"instructions": 3, "instructions_given": True}})
    with pytest.raises(UserError, match=r"program.instructions in .* is 3, no object"):
        plan_run(RunRequest(LETTERS, run, resume=True))


def test_the_name_is_the_options_or_the_tasks():
    request = RunRequest("own", None)
    assert reflection_name(request, plan_of()) is None
    assert reflection_name(request, plan_of(lambda: dspy.LM("hosted_vllm/own"))) == "hosted_vllm/own"
    assert reflection_name(replace(request, reflection_lm="policy"), plan_of(lambda: "hosted_vllm/own")) == "policy"


def test_a_comparison_passes_the_option_on_and_refuses_runs_with_another(tmp_path):
    common = Common(100, reflection_lm="hosted_vllm/asked")
    job = Job("programs/letters", "fst", 0, tmp_path / "fst-seed0", common)
    command = job.command()
    assert command[command.index("--reflection-lm") + 1] == "hosted_vllm/asked"
    check_jobs([job])
    settings = replace(job, common=Common(100)).request
    write_run(job.folder, "fst", 0, RL_CURVE, config=plan_run(settings).settings.config.to_dict())
    check_jobs([replace(job, common=Common(100))])
    with pytest.raises(UserError, match="reflection_lm None, not 'hosted_vllm/asked'"):
        check_jobs([job])
