"""`FST.distill` on the toy program: what it asks, spends, keeps, refuses and writes, and that it can be resumed."""

import hashlib
from collections import Counter
from dataclasses import replace

import dspy
import pytest

from fst_optimizer import FST, FSTConfig, NotDistilled, UserError, load
from fst_optimizer.distill.cycle import lesson_requests, reopened, rows_of
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.finished.load import read_finished
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.run.state import Best, State, Taught
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Call, Candidate, Outcome, Population, Rollout, RolloutCounts, items_of
from helpers.run_check import assert_as_designed
from helpers.toy import (
    RULE,
    SETTINGS,
    TRAIN,
    VAL,
    Program,
    Reflection,
    assert_same_run,
    metric,
    optimizer,
    run_toy,
    said,
    student_of,
)

SHORT = {"first": "Answer.", "second": "Answer."}
LONG = {name: f"{text} {RULE}" for name, text in SHORT.items()}
STEP = 8
"""Rollouts of a step by the toy's settings: 2 x 4."""
INTERRUPTED = KeyboardInterrupt()


def learns(prompt, request):
    """Right with the rule, and without it from the third version on: as if the steps had taught it."""
    return said(RULE in prompt or request.version >= 3)


def half_learns(prompt, request):
    """Right with the rule; without it wrong, and from the first version on half right."""
    middle, answer = RULE in prompt or request.version >= 1, RULE in prompt
    return chat_answer(middle="right" if middle else "wrong", answer="right" if answer else "wrong")


def long_program(policy):
    return apply_texts(student_of(policy), LONG)


def distill(run_dir, policy, *, values=None, instructions=SHORT, program=None, **options):
    fst = optimizer(run_dir, values=values, **options)
    return fst.distill(program or long_program(policy), trainset=TRAIN, valset=VAL, instructions=instructions)


def tree(folder):
    """Every file's path and hash."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_distilled_run_is_a_run_that_says_where_it_comes_from(tmp_path, scripted):
    policy = scripted(learns)
    program = long_program(policy)
    better = distill(tmp_path / "run", policy, program=program)
    assert_as_designed(tmp_path / "run")
    assert seed_texts(better) == SHORT and seed_texts(program) == LONG
    assert (program.first.lm.version, better.first.lm.version) == (0, 4)
    result = read_json(tmp_path / "run" / "result.json")
    assert result == better.detailed_results.result
    assert result["distilled_from"] == {"policy_version": 0, "candidate": LONG}
    # Two cycles of two steps: version 4 is the first that is validated and knows.
    assert (result["val_score_before"], result["val_score_after"], result["teacher_score"]) == (0.0, 1.0, 1.0)
    assert (result["method"], result["steps"], result["cycles"], result["ended"]) == ("rl", 4, 2, "done")
    assert result["rollouts"]["slow"] == 4 * STEP and result["rollouts"]["fast"] == 0
    # The rule's bytes, in each of two prompts: what is not read any more.
    saved = result["tokens_per_answer"]["before"] - result["tokens_per_answer"]["after"]
    assert saved == 2 * len(f" {RULE}")
    assert result["token_entropy"]["before"] > 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(line["updated"] and line["kl_to_teacher"] > 0 and line["calls"] == 2 * STEP for line in steps)
    # Teacher, student before and twice after (the KL's rollouts too), and the gate's two samples.
    assert result["rollouts"]["eval"] == 4 + 4 + 2 * (4 + 2) + 2 * 2
    assert sum(result["outcomes"].values()) == 4 * STEP + result["rollouts"]["eval"]


def test_every_call_is_learned_from_under_the_teachers_prompt(tmp_path, scripted, monkeypatch):
    policy, seen = scripted(learns), []
    distiller = type(policy).distiller

    def watched(self, *args, **settings):
        made = distiller(self, *args, **settings)
        step = made.step
        made.step = lambda rows: seen.append(rows) or step(rows)
        return made

    monkeypatch.setattr(type(policy), "distiller", watched)
    distill(tmp_path / "run", policy)
    assert [len(rows) for rows in seen] == [2 * STEP] * 4
    for row in (row for rows in seen for row in rows):
        own, teachers = (policy.tokenizer.decode(ids) for ids in (row.call.prompt_ids, row.call.teacher_ids))
        assert RULE not in own and own == teachers.replace(f" {RULE}", "")


def test_a_compiled_program_says_what_it_was_compiled_from(tmp_path, scripted):
    policy = scripted(half_learns)
    fst = optimizer(tmp_path / "first", values={"method": "gepa"}, reflection_lm=Reflection())
    compiled = fst.compile(student_of(policy), trainset=TRAIN, valset=VAL)
    assert RULE in str(seed_texts(compiled))
    before = tree(tmp_path / "first")
    with pytest.raises(NotDistilled):
        distill(tmp_path / "run", policy, program=compiled, instructions=None)
    assert tree(tmp_path / "first") == before and compiled.first.lm.version == 0
    origin = read_json(tmp_path / "run" / "config.json")["distilled_from"]
    first = read_json(tmp_path / "first" / "result.json")
    assert origin["candidate"] == first["candidate"]
    assert {name: origin[name] for name in ("task", "method", "seed")} == {
        "task": "Program",
        "method": "gepa",
        "seed": 0,
    }
    assert origin["run_id"] == read_json(tmp_path / "first" / "config.json")["run_id"]
    assert read_json(tmp_path / "run" / "config.json")["program"]["instructions"] == SHORT


def test_a_refused_gate_leaves_no_result_and_can_be_resumed_with_a_lower_bar(tmp_path, scripted):
    policy = scripted(half_learns)
    with pytest.raises(NotDistilled) as caught:
        distill(tmp_path / "run", policy)
    text = str(caught.value)
    assert (
        "scores 0.5000 on the validation set (0.0000 before), with it 1.0000; distill.keep_gain=0.9 asks for 0.9000"
        in text
    )
    assert "Nothing was made that can be used" in text and repr(str(tmp_path / "run")) in text
    assert not (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "program.json").exists()
    with pytest.raises(UserError, match="unfinished run"):
        load(tmp_path / "run", program=Program())
    asked = len(policy.engine.requests)
    with pytest.raises(NotDistilled):  # the same again, by the rollouts of the gate alone
        distill(tmp_path / "run", policy, resume=True)
    assert len(policy.engine.requests) <= asked + 2 * 2 * 2
    distill(tmp_path / "run", policy, resume=True, values={"distill.keep_gain": 0.5})
    assert_as_designed(tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["steps"], result["val_score_after"], result["teacher_score"]) == (4, 0.5, 1.0)


def test_a_collapsed_policy_is_refused(tmp_path, scripted, monkeypatch):
    policy = scripted(learns)
    monkeypatch.setattr(type(policy), "entropy_of", lambda self, calls, version: 0.1 if version else 0.4)
    with pytest.raises(NotDistilled, match=r"entropy is 0\.1000 nats a token and its teacher's 0\.4000"):
        distill(tmp_path / "run", policy)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_refused_one_goes_on_where_there_is_room_for_more(tmp_path, scripted):
    with pytest.raises(NotDistilled):
        distill(tmp_path / "run", scripted(learns), values={"budget.max_cycles": 1})
    distill(tmp_path / "run", scripted(learns), resume=True, allow_changes=True, values={"budget.max_cycles": 3})
    distill(tmp_path / "whole", scripted(learns), values={"budget.max_cycles": 3})
    assert_as_designed(tmp_path / "run")
    one, other = (read_json(tmp_path / name / "result.json") for name in ("run", "whole"))
    assert one["steps"] == other["steps"] == 4 and one["val_score_after"] == 1.0
    assert one["rollouts"]["slow"] == other["rollouts"]["slow"]


@pytest.mark.parametrize("after", [2, 11, 31, 52])
def test_one_that_was_interrupted_comes_to_the_same(tmp_path, scripted, after):
    distill(tmp_path / "whole", scripted(learns))
    with inject("rollout.end", raising(INTERRUPTED), after=after), pytest.raises(KeyboardInterrupt):
        distill(tmp_path / "run", scripted(learns))
    assert not (tmp_path / "run" / "result.json").exists()
    distill(tmp_path / "run", scripted(learns), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_caps_hold(tmp_path, scripted):
    with pytest.raises(NotDistilled):
        distill(tmp_path / "run", scripted(learns), values={"budget.max_rollouts": 2 * STEP + 3})
    state = read_json(tmp_path / "run" / "state.json")["state"]
    assert (state["rollouts"]["slow"], state["step"], state["ended"], state["cap"]) == (
        *(2 * STEP, 2),
        *("budget", "max_rollouts"),
    )
    with pytest.raises(NotDistilled):
        distill(tmp_path / "tokens", scripted(learns), values={"budget.max_tokens": 1})
    state = read_json(tmp_path / "tokens" / "state.json")["state"]
    assert (state["rollouts"]["slow"], state["cap"]) == (0, "max_tokens")


def test_a_student_that_is_as_good_already_learns_nothing(tmp_path, scripted):
    better = distill(tmp_path / "run", scripted(lambda prompt, request: said(True)))
    assert_as_designed(tmp_path / "run")
    result = better.detailed_results.result
    assert (result["steps"], result["rollouts"]["slow"], result["policy_version"]) == (0, 0, 0)
    assert seed_texts(better) == SHORT


def test_a_predictor_that_is_not_trained_keeps_its_instruction(tmp_path, scripted):
    values = {"predictors": {"second": "evolve"}, "distill.keep_gain": 1e-9, "distill.min_entropy": 0}
    better = distill(tmp_path / "run", scripted(learns), instructions={"first": "Answer."}, values=values)
    assert seed_texts(better) == {"first": "Answer.", "second": LONG["second"]}
    with pytest.raises(UserError, match="names 'second', whose calls do not train the policy"):
        distill(tmp_path / "other", scripted(learns), values=values)


class Rewrites(Program):
    def forward(self, question):
        signature = self.first.signature.with_instructions(f"{self.first.signature.instructions} Today is Monday.")
        middle = self.first(question=question, signature=signature).middle
        return dspy.Prediction(middle=middle, answer=self.second(middle=middle).answer)


@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_rendered_is_refused(tmp_path, scripted, dry):
    policy = scripted(learns)
    program = apply_texts(Rewrites(), LONG)
    program.set_lm(policy.lm)
    with pytest.raises(UserError) as caught:
        distill(tmp_path / "run", policy, program=program, values={"run.dry_run": dry})
    assert (
        "predictor 'first' cannot be distilled, as the program changes its instruction while it runs: what its teacher "
        "would have been asked is unknown. Let dspy alone make its prompt, or set predictors.first=evolve, with which "
        "it keeps its instruction"
    ) in str(caught.value)
    assert (tmp_path / "run").exists() is not dry


@pytest.mark.parametrize(
    ("instructions", "error"),
    [
        (LONG, "the program has the very instructions that it should be distilled to"),
        (None, "instructions says nothing of first, second, and the program does not say what stood there before"),
        ({"first": "Answer."}, "instructions says nothing of second, and the program does not say"),
        ({"frist": "Answer."}, "instructions names 'frist': the program has no such predictor; did you mean 'first'"),
        ({"first": "", "second": "Answer."}, "instructions: the instruction of first is '': give a text"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(tmp_path, scripted, instructions, error):
    with pytest.raises(UserError) as caught:
        distill(tmp_path / "run", scripted(learns), instructions=instructions)
    assert error in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_distillation_is_resumed_as_one_and_nothing_else_is(tmp_path, scripted):
    with pytest.raises(NotDistilled):
        distill(tmp_path / "run", scripted(half_learns))
    for values in ({}, {"method": "rl"}):
        with pytest.raises(UserError, match="is a distillation: go on with fst distill"):
            run_toy(tmp_path / "run", scripted(half_learns), resume=True, allow_changes=True, values=values)
    values = {"method": "rl"}
    with inject("rollout.end", raising(INTERRUPTED), after=12), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "other", scripted(half_learns), values=values)
    with pytest.raises(UserError, match="is no distillation: go on with fst compile"):
        distill(tmp_path / "other", scripted(half_learns), resume=True, allow_changes=True)


def test_a_distilled_run_is_loaded_and_verified_like_any_other(tmp_path, scripted, tiny_model):
    distill(tmp_path / "run", scripted(learns))
    program = load(tmp_path / "run", program=Program(), model=str(tiny_model), engine="torch")
    assert seed_texts(program) == SHORT and program.first.lm.version == 4
    program.first.lm.engine.policy.close()
    path = tmp_path / "run" / "program.json"
    path.write_text(path.read_text().replace("Answer.", "Answer!"))
    with pytest.raises(UserError, match="damaged, changed or missing"):
        read_finished(tmp_path / "run")


def test_the_default_leaves_other_runs_as_they_are(tmp_path, scripted):
    run_toy(tmp_path / "one", scripted(half_learns))
    run_toy(tmp_path / "other", scripted(half_learns), values={"distill.keep_gain": 0.5, "distill.min_entropy": 0})
    assert_same_run(tmp_path / "one", tmp_path / "other")
    result = read_json(tmp_path / "one" / "result.json")
    assert not {"distilled_from", "teacher_score", "tokens_per_answer"} & result.keys()


# -- pure ----------------------------------------------------------------------------------------------------------

CONFIG = FSTConfig.from_dict(SETTINGS)
STUDENT = Candidate(SHORT)


def call(**fields):
    plain = {"predictor": "first", "prompt_ids": (1, 2), "completion_ids": (3,), "logprobs": (-1.0,)}
    plain |= {"temperature": 1.0, "policy_version": 0, "finish_reason": "stop", "teacher_ids": (1, 1, 2)}
    return Call(**{**plain, **fields})


def rollout(*calls, outcome=Outcome.OK, score=1.0):
    return Rollout("c", "train-0", 0, 0, outcome, score, calls=calls)


def test_a_step_takes_as_many_examples_as_there_are():
    items = items_of(TRAIN, "train")
    requests = lesson_requests(STUDENT, items, CONFIG, 0, step=0)
    assert len(requests) == STEP and Counter(one.item.id for one in requests).most_common(1)[0][1] == 2
    assert len({(one.item.id, one.index) for one in requests}) == STEP
    assert {one.item.id for one in requests} == {item.id for item in items}
    many = lesson_requests(STUDENT, items_of(TRAIN * 5, "train"), CONFIG, 0, step=0)
    assert len({one.item.id for one in many}) == STEP and {one.index for one in many} == {0}
    again = lesson_requests(STUDENT, items, CONFIG, 0, step=0)
    assert again == requests and lesson_requests(STUDENT, items, CONFIG, 1, step=0) != requests
    assert len(lesson_requests(STUDENT, items[:1], CONFIG, 0, step=0)) == 4  # as `planned` counts a step


def test_failed_rollouts_are_learned_from_and_greedy_or_unknown_calls_are_not():
    config = CONFIG.with_values({"predictors": {"second": "evolve"}})
    found = rows_of(
        [
            rollout(call(), call(predictor="second")),
            rollout(call(), outcome=Outcome.PARSE_ERROR),
            rollout(call(temperature=0.0), call(completion_ids=(), logprobs=())),
            rollout(call(teacher_ids=()), call(teacher_ids=(1,) * 10)),
        ],
        config,
        context_length=10,
    )
    assert [(row.rollout, row.advantage) for row in found.rows] == [(0, 0.0), (1, 0.0)]
    assert (found.greedy, found.unrendered) == ({"first": 1}, 2)
    assert "temperature 0" in found.left_out
    assert "cannot be rendered" in replace(found, greedy=Counter()).left_out
    assert replace(found, greedy=Counter(), unrendered=0).left_out == ""


@pytest.mark.parametrize(
    ("values", "best", "opened"),
    [
        ({"budget.max_cycles": 3}, 0.5, True),
        ({"budget.max_cycles": 2}, 0.5, False),  # they are over
        ({"budget.max_cycles": 3, "budget.max_rollouts": 39}, 0.5, False),  # 32 spent, and 8 are a step
        ({"budget.max_cycles": 3, "budget.max_rollouts": 40}, 0.5, True),
        ({"budget.max_cycles": 3}, 0.92, False),  # .2 + .9 * .8 = .92: good enough
        ({"budget.max_cycles": 3}, 0.91, True),
    ],
)
def test_a_refused_one_is_opened_again_where_it_may_go_on(values, best, opened):
    state = State(Population((STUDENT,)), Best(STUDENT, 4, best), cycle=2, step=4, ended="done", val_score_before=0.2)
    state = replace(state, teacher=Taught(1.0, 100.0), rollouts=RolloutCounts(slow=32))
    assert bool(reopened(CONFIG.with_values(values), state).ended) is not opened


def test_metrics_stay_two_argument_functions_too(tmp_path, scripted):
    policy = scripted(learns)
    fst = FST(lambda example, prediction: metric(example, prediction).score, config=CONFIG, run_dir=tmp_path / "run")
    assert fst.distill(long_program(policy), trainset=TRAIN, valset=VAL, instructions=SHORT)
