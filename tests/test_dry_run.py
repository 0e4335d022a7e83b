"""What is refused, warned of and told before a run spends anything."""

import logging
import queue
import re
import threading
from types import SimpleNamespace

import dspy
import pytest
from dspy.lm15 import AuthError

from fst_optimizer import FST, ProgramError, UserError
from fst_optimizer.config.run import METHODS, FSTConfig
from fst_optimizer.dry_run import check_budget, check_rollouts, check_scores, planned_cost_usd
from fst_optimizer.errors import MetricError
from fst_optimizer.planned import RunSizes, planned
from fst_optimizer.store.files import read_json
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Call, Outcome, Raised, Rollout, Usage
from helpers.toy import (
    SHORT,
    TRAIN,
    VAL,
    Program,
    Reflection,
    answer,
    frozen,
    metric,
    optimizer,
    student_of,
    undated_result,
)
from helpers.toy import untimed_metrics as metrics_of

ON = {"run.dry_run": True}


def compiled(policy, run_dir, student=None, values=None, **options):
    fst = optimizer(run_dir, settings=SHORT, values={**ON, **(values or {})}, **options)
    return fst.compile(student or student_of(policy), trainset=TRAIN, valset=VAL)


def broken(policy, forward):
    """The toy program with another forward."""
    student = type("Broken", (Program,), {"forward": forward})()
    student.set_lm(policy.lm)
    return student


def levels(findings):
    return {one.name: one.level for one in findings}


@pytest.fixture
def policy(scripted):
    return scripted(answer)


# -- refused -------------------------------------------------------------------------------------------------------


def test_a_program_that_raises_on_both_examples_is_refused_with_its_last_lines(policy, tmp_path):
    def forward(self, question):
        return self.first(question=question).midle

    with pytest.raises(ProgramError) as caught:
        compiled(policy, tmp_path / "run", broken(policy, forward))
    text = str(caught.value)
    assert "the program raised on both train-0 and train-1" in text
    assert "return self.first(question=question).midle" in text and "test_dry_run.py" in text
    assert "\nAttributeError: 'Prediction' object has no attribute 'midle'\n(found in the dry run" in text
    assert text.count("midle\n") == 1, "both raised alike: told once"
    assert len(policy.engine.requests) == 2
    assert not (tmp_path / "run").exists()


def test_a_program_without_calls_of_the_policy_is_refused(policy, tmp_path):
    with pytest.raises(UserError, match="no call of the policy was recorded on both train-0 and train-1"):
        compiled(policy, tmp_path / "run", broken(policy, lambda self, question: dspy.Prediction(middle="", answer="")))


def test_a_program_whose_calls_come_from_a_thread_that_it_did_not_start_is_refused_with_the_remedy(policy, tmp_path):
    todo = queue.SimpleQueue()

    def serve():
        while True:
            work, told = todo.get()
            told.put(work())

    threading.Thread(target=serve, daemon=True).start()

    def forward(self, question):
        told = queue.SimpleQueue()
        todo.put((lambda: Program.forward(self, question), told))
        return told.get(timeout=20)

    with pytest.raises(
        UserError, match=r"4 call\(s\) of the policy came from outside.*contextvars.copy_context\(\).run"
    ):
        compiled(policy, tmp_path / "run", broken(policy, forward))


@pytest.mark.parametrize(
    ("bad", "error", "named"),
    [
        (lambda e, p: 14.5, UserError, r"outside \[0, 1\] \(14.5 on train-0, 14.5 on train-1\).*divide"),
        (lambda e, p: -0.5, UserError, r"outside \[0, 1\] \(-0.5 on train-0, -0.5 on train-1\): let the metric map"),
        (lambda e, p: float("nan"), UserError, r"returned nan on example train-[01]: return a finite number"),
        (lambda e, p: e.gold, MetricError, r"^metric <lambda> raised on example train-[01]: AttributeError"),
        (
            lambda e, p, trace=None, pred_name=None, pred_trace=None: 0.5 if pred_name is None else 50,
            UserError,
            r"outside \[0, 1\] \(50 on train-0, first, 50 on train-0, second, 50 on train-1, first, 50",
        ),
    ],
)
def test_a_metric_that_gives_no_share_is_refused(policy, tmp_path, bad, error, named):
    with pytest.raises(error, match=named):
        compiled(policy, tmp_path / "run", metric=bad)
    assert len(policy.engine.requests) <= 4
    assert not (tmp_path / "run").exists()


def refusing(error):
    def answer(request):
        raise error

    lm, engine = frozen("openai/reflector", answer=answer)
    return lm, engine


def test_a_reflection_lm_that_refuses_is_asked_once_and_refused(policy, tmp_path):
    lm, engine = refusing(AuthError("no such key: sk-abcdefghijklmnop"))
    with pytest.raises(UserError, match=r"the reflection LM openai/reflector failed: .*no such key") as caught:
        compiled(policy, tmp_path / "run", reflection_lm=lm)
    assert "sk-abc" not in str(caught.value) and "Correct its key, name or address" in str(caught.value)
    assert engine.calls == 1


def test_a_connection_that_is_refused_is_refused(policy, tmp_path):
    lm = dspy.LM("openai/gpt-5.2", api_key="none", api_base="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"the reflection LM openai/gpt-5.2 failed: .*[Cc]onnect"):
        compiled(policy, tmp_path / "run", reflection_lm=lm)


def test_all_problems_are_told_at_once(policy, tmp_path):
    run_dir = tmp_path / "run"
    compiled(policy, run_dir)
    lm, _ = refusing(AuthError("no such key"))
    before = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*"))
    values = {"budget.max_rollouts": 1}
    with pytest.raises(UserError) as caught:
        compiled(policy, run_dir, values=values, reflection_lm=lm, metric=lambda example, prediction: 50)
    text = str(caught.value)
    assert "4 problems\n(1) run_dir " in text and "holds a finished run" in text
    assert "(2) budget.max_rollouts is 1: it does not pay for one candidate on the anchor (2 rollouts, " in text
    assert "nor for one step (8 rollouts, " in text
    assert "(3) the metric's score is outside" in text and "(4) the reflection LM openai/reflector failed" in text
    assert "run.dry_run=False" in text
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*")) == before


def test_dollars_cannot_be_capped_where_a_price_is_unknown(policy, tmp_path):
    lm, engine = frozen("openai/nobody-knows-it")
    with pytest.raises(UserError, match=r"max_cost_usd is 1.0, and what openai/nobody-knows-it costs is unknown"):
        compiled(policy, tmp_path / "run", student_of(policy, second=lm), values={"budget.max_cost_usd": 1.0})
    assert engine.calls == 2


# -- warned of -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (chat_answer(middle="same", answer="same"), "scores: 0 on each of both train-0 and train-1"),
        ("no format", "answers: parse_error on both train-0 and train-1: The answer could not be parsed."),
    ],
)
def test_what_is_odd_is_warned_of_and_goes_on(scripted, tmp_path, caplog, text, named):
    policy = scripted(lambda prompt, request: text)
    found = optimizer(tmp_path / "run").dry_run(student_of(policy), trainset=TRAIN, valset=VAL)
    found.refuse()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"dry run, {named}")


def test_raising_on_one_example_is_warned_of(policy, tmp_path, caplog):
    def forward(self, question):
        if question == "q1":
            raise KeyError(question)
        return Program.forward(self, question)

    compiled(policy, tmp_path / "run", broken(policy, forward), values={"method": "gepa"})
    (warning,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("the program raised")]
    assert "on example train-1" in warning and "KeyError: 'q1'" in warning
    alarms = read_json(tmp_path / "run" / "result.json")["alarms"]
    assert warning in alarms, "what the dry run warns of is among the run's alarms"


def test_a_reflection_lm_that_may_answer_later_is_warned_of(policy, tmp_path):
    lm, _ = frozen("openai/reflector", fails_at="always")  # a rate limit
    found = optimizer(tmp_path / "run", reflection_lm=lm).dry_run(student_of(policy), trainset=TRAIN, valset=VAL)
    assert levels(found.findings)["reflection"] == "warn"
    found.refuse()


# -- what it leaves ------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_and_without_but_for_what_the_dry_run_spent(scripted, tmp_path):
    policies = {dry: scripted(answer) for dry in (True, False)}
    for dry, policy in policies.items():
        compiled(policy, tmp_path / str(dry), values={"run.dry_run": dry, "budget.max_cycles": 2})
        assert policy.fresh_seed() == 0, "no call outside of rollouts took a seed"
    # Four calls of the dry run, the others in whatever order threads made them.
    asked = {dry: sorted(map(repr, policy.engine.requests)) for dry, policy in policies.items()}
    extra = sorted(map(repr, policies[True].engine.requests[:4]))
    assert sorted([*asked[False], *extra]) == asked[True]
    found = optimizer(None, settings=SHORT).dry_run(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    tokens = found.spent["tokens"]
    with_, without = tmp_path / "True", tmp_path / "False"
    for one, other in zip(metrics_of(with_), metrics_of(without), strict=True):
        assert one["rollouts"].pop("eval") == other["rollouts"].pop("eval") + 2
        assert one == other
    result, plain = (undated_result(run) for run in (with_, without))
    assert result["rollouts"].pop("eval") == plain["rollouts"].pop("eval") + 2
    assert result.pop("tokens") == plain.pop("tokens") + tokens
    assert result["outcomes"].pop("ok") == plain["outcomes"].pop("ok") + 2
    assert result == plain
    for folder in ("population", "rollouts"):
        for path in sorted((without / folder).iterdir()):
            one, other = (run / folder / path.name for run in (with_, without))
            assert without_seconds(one) == without_seconds(other)


def without_seconds(path):
    return re.sub(r'"seconds": ?[\d.e-]+', "", path.read_text())


def test_a_resume_makes_no_dry_run(policy, tmp_path):
    def interrupt(data):
        if data["kind"] == "fast":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(policy, tmp_path / "run", callbacks=[interrupt])
    before = read_json(tmp_path / "run" / "state.json")["state"]["rollouts"]["eval"]
    assert before == len(VAL) + 2
    program = compiled(policy, tmp_path / "run", resume=True, metric=metric)
    lines = metrics_of(tmp_path / "run")
    assert program.detailed_results.result["rollouts"] == lines[-1]["rollouts"]
    assert lines[0]["rollouts"]["eval"] == len(VAL) + 2


def test_what_the_dry_run_spends_is_counted(policy, tmp_path):
    lm, engine = frozen("openai/gpt-4o-mini")
    student = student_of(policy, second=lm)
    result = compiled(policy, tmp_path / "run", student, values={"method": "gepa"}).detailed_results.result
    assert engine.calls == result["lm_usage"]["openai/gpt-4o-mini"]["calls"]


def test_the_dry_run_alone_writes_nothing_and_asks_the_reflection_lm_one_word(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm, engine = frozen("openai/gpt-4o-mini", answer=lambda request: asked.append(request) or "ready")
    asked = []
    found = FST(metric, config=SHORT, reflection_lm=lm).dry_run(student_of(policy), trainset=TRAIN, valset=VAL)
    assert levels(found.findings) == {
        **dict.fromkeys(("budget", "program", "calls", "reflection", "plan"), "ok"),
        "scores": levels(found.findings)["scores"],
    }
    assert (found.spent["rollouts"].eval, found.spent["reflection_calls"]) == (2, 0)
    assert (engine.calls, asked[0].config.max_tokens) == (1, 16)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_reflects_is_not_asked(policy, tmp_path):
    found = optimizer(None, reflection_lm=policy.base_lm).dry_run(student_of(policy), trainset=TRAIN, valset=VAL)
    assert levels(found.findings)["reflection"] == "ok"
    assert policy.fresh_seed() == 0


def test_a_reflection_lm_of_ones_own_is_tried_too(policy):
    found = optimizer(None, reflection_lm=Reflection()).dry_run(student_of(policy), trainset=TRAIN, valset=VAL)
    assert levels(found.findings)["reflection"] == "ok"


def test_the_plan_is_told_and_logged(policy, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fst_optimizer")
    heard = []
    compiled(policy, tmp_path / "run", callbacks=[heard.append])
    (plan,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("plan: ")]
    # Two on the dry run's examples, 4 before, and after prompts and after weights 4 and 2 for the KL.
    assert plan == "plan: at most 1 cycles and 1 steps: 12 fast, 8 slow and 18 eval rollouts, 1 reflections"
    assert [f"plan: {event['text']}" for event in heard if event["kind"] == "plan"] == [plan]


# -- the checks ----------------------------------------------------------------------------------------------------

CALL = Call("first", (1,), (2,), (-1.0,), 1.0, 0, "stop")


def rollout(place, outcome=Outcome.OK, score=0.5, calls=1, **rest):
    return Rollout("c", f"train-{place}", 0, 0, outcome, score, calls=(CALL,) * calls, **rest)


def raised(place, error="KeyError", line=3):
    lines = ('File "own.py"', f"{error}: 'x'")
    return rollout(place, Outcome.PROGRAM_ERROR, 0.0, calls=0, raised=Raised(error, f"own.py:{line}", lines))


@pytest.mark.parametrize(
    ("rollouts", "strays", "expected"),
    [
        ((rollout(0, score=1), rollout(1, score=0)), 0, {"program": "ok", "calls": "ok", "scores": "ok"}),
        ((rollout(0), rollout(1)), 0, {"program": "ok", "calls": "ok", "scores": "warn"}),
        ((rollout(0),), 0, {"program": "ok", "calls": "ok", "scores": "ok"}),
        ((rollout(0, score=1), rollout(1, calls=0)), 0, {"program": "ok", "calls": "warn", "scores": "ok"}),
        ((rollout(0, calls=0), rollout(1, calls=0)), 0, {"program": "ok", "calls": "fail", "scores": "warn"}),
        ((rollout(0), rollout(1)), 1, {"program": "ok", "calls": "fail", "scores": "warn"}),
        ((raised(0), raised(1)), 0, {"program": "fail", "scores": "warn"}),
        ((raised(0), raised(1)), 2, {"program": "fail", "calls": "fail", "scores": "warn"}),
        ((raised(0), rollout(1)), 0, {"program": "warn", "calls": "warn", "scores": "ok"}),
        (
            (rollout(0, Outcome.TRUNCATED), rollout(1, Outcome.PARSE_ERROR)),
            0,
            {"program": "ok", "calls": "ok", "answers": "warn", "scores": "warn"},
        ),
        (
            (rollout(0, Outcome.TIMEOUT), rollout(1, Outcome.ENGINE_ERROR)),
            0,
            {"program": "warn", "calls": "ok", "scores": "warn"},
        ),
        ((rollout(0, score=1.001), rollout(1)), 0, {"program": "ok", "calls": "ok", "scores": "fail"}),
    ],
)
def test_what_two_rollouts_show(rollouts, strays, expected):
    assert levels(check_rollouts(rollouts, strays)) == expected


def test_programs_that_raise_in_two_ways_are_told_both():
    (found, _) = check_rollouts((raised(0), raised(1, "TypeError")), 0)
    assert "KeyError: 'x'" in found.text and "TypeError: 'x'" in found.text
    assert "\n" not in str(found) and str(found).startswith("fail program: the program raised on both train-0 and ")


def test_a_score_of_exactly_one_or_zero_is_inside():
    (found,) = check_scores((rollout(0, score=1.0), rollout(1, score=0.0)))
    assert (found.level, found.text) == ("ok", "1 on train-0, 0 on train-1")


def config(method="fst", **values):
    small = {"fast.anchor_size": 4, "fast.max_rollouts": 30, "fast.population": 2, "fast.max_proposals": 5}
    small |= {"rollout.group_size": 4, "rollout.batch_size": 3, "train.steps_per_cycle": 3, "budget.max_cycles": 2}
    small |= {"budget.max_rollouts": 100} if method == "sequential" else {}
    return FSTConfig().with_values({**small, "eval.kl_examples": 5, "method": method, **values})


@pytest.mark.parametrize(
    ("method", "cap", "level", "lacking"),
    [
        ("fst", 12, "ok", ""),
        ("fst", 11, "warn", "one step (12 rollouts, rollout.batch_size x rollout.group_size); raise"),
        ("fst", 3, "fail", "one candidate on the anchor (4 rollouts, fast.anchor_size) nor for one step"),
        ("rl", 11, "fail", "one step"),
        ("rl", 12, "ok", ""),
        ("gepa", 4, "ok", ""),
        ("gepa", 3, "fail", "one candidate on the anchor"),
        ("sequential", 12, "ok", ""),
        ("sequential", 7, "fail", "half of it for prompts, it does not pay for one candidate on the anchor"),
        ("fst", None, "ok", ""),
        ("once", 12, "ok", ""),
        ("once", 3, "fail", "budget.max_rollouts is 3: it does not pay for one candidate on the anchor"),
    ],
)
def test_whether_the_budget_pays_for_a_cycle(method, cap, level, lacking):
    found = check_budget(config(method, **{"budget.max_rollouts": cap or 10**6}), RunSizes(train=100, val=10))
    assert (found.level, lacking in found.text) == (level, True)


def test_a_search_that_pays_for_no_candidate_is_warned_of_by_its_own_setting():
    found = check_budget(config("once", **{"fast.once_rollouts": 3}), RunSizes(train=100, val=10))
    assert found.level == "warn"
    assert found.text.startswith("fast.once_rollouts is 3: it does not pay for one candidate on the anchor (4 rollouts")
    without = check_budget(config("once", **{"fast.once_rollouts": 0}), RunSizes(train=100, val=10))
    assert without.text == "pays for one step (12 rollouts, rollout.batch_size x rollout.group_size)"


def test_a_small_trainset_makes_a_small_step():
    assert check_budget(config("rl", **{"budget.max_rollouts": 8}), RunSizes(train=2, val=10)).level == "ok"


# Two cycles, three steps each of 3 x 4 rollouts; 10 validation examples, of which 5 for the KL; 7 test examples.
SIZES = RunSizes(train=100, val=10, test=7, components=2)


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        # eval: 10 before, 2 x 2 validations of 10 + 5, the test set twice
        ("fst", {}, {"cycles": 2, "steps": 6, "fast": 60, "slow": 72, "training": 132, "eval": 84, "reflections": 10}),
        ("rl", {}, {"cycles": 2, "steps": 6, "fast": 0, "slow": 72, "training": 72, "eval": 54, "reflections": 0}),
        # no weights change: nothing is measured for the KL
        ("gepa", {}, {"cycles": 2, "steps": 0, "fast": 60, "slow": 0, "training": 60, "eval": 44, "reflections": 10}),
        (
            "sequential",  # half of 100 for prompts
            {},
            # The cycle in which the search ends validates twice: 10 before, 3 x (10 + 5), the test set twice.
            {"cycles": 2, "steps": 6, "fast": 50, "slow": 72, "training": 100, "eval": 69, "reflections": 10},
        ),
        ("once", {}, {"cycles": 2, "steps": 6, "fast": 30, "slow": 72, "training": 102, "eval": 69, "reflections": 10}),
        (
            "once",  # no search: as rl
            {"fast.once_rollouts": 0},
            {"cycles": 2, "steps": 6, "fast": 0, "slow": 72, "training": 72, "eval": 54, "reflections": 0},
        ),
        (
            "fst",
            {"budget.max_rollouts": 50},
            {"cycles": 2, "steps": 4, "fast": 50, "slow": 48, "training": 50, "eval": 84, "reflections": 10},
        ),
        (
            "fst",
            {"budget.max_steps": 2},
            {"cycles": 1, "steps": 2, "fast": 30, "slow": 24, "training": 54, "eval": 54, "reflections": 5},
        ),
        (
            "fst",
            {"fast.components": "all", "fast.reflection_calls": 17, "eval.candidates": 9, "eval.max_examples": 6},
            # 6 before, 2 x 2 validations of two candidates on 6 + 5, the test set twice
            {"cycles": 2, "steps": 6, "fast": 60, "slow": 72, "training": 132, "eval": 108, "reflections": 17},
        ),
    ],
)
def test_the_most_that_a_run_spends(method, values, expected):
    plan = planned(config(method, **values), SIZES)
    names = ("cycles", "steps", "fast", "slow", "training", "eval")
    assert {**{name: getattr(plan, name) for name in names}, "reflections": plan.reflection_calls} == expected
    assert plan.rollouts == expected["training"] + expected["eval"]


def test_teachers_the_start_version_and_the_dry_run_are_in_the_plan():
    sizes = RunSizes(train=100, val=10, teachers=2, start_version=3)
    plan = planned(config(**{"rollout.teacher_rollouts": 3}), sizes, dry_run=2)
    assert plan.slow == 6 * 3 * (4 + 2 * 3)
    assert plan.eval == 2 + (10 + 5) + 4 * (10 + 5)


@pytest.mark.parametrize(
    "own", [*({"method": method} for method in METHODS), {"allocation": "adaptive", "budget.max_cycles": 4}]
)
def test_no_run_spends_more_than_was_planned(policy, tmp_path, own):
    values = {"budget.max_cycles": 2, "budget.max_rollouts": 40, **own}
    fst = optimizer(tmp_path / "run", settings=SHORT, values={**ON, **values})
    plan = fst.dry_run(student_of(policy), trainset=TRAIN, valset=VAL).planned
    result = fst.compile(student_of(policy), trainset=TRAIN, valset=VAL).detailed_results.result
    spent = result["rollouts"]
    assert spent["fast"] <= plan.fast and spent["slow"] <= plan.slow and spent["eval"] <= plan.eval
    assert spent["fast"] + spent["slow"] <= plan.training <= 40
    assert result["reflection_calls"] <= plan.reflection_calls and result["steps"] <= plan.steps


def test_dollars_are_those_of_the_rollouts_tried_for_all_that_are_planned():
    plan = SimpleNamespace(rollouts=1000)
    usage = {"a/b": Usage(2, 2000, 0, 1000)}  # by two rollouts
    assert planned_cost_usd(plan, usage, 2, {"a/b": (1.0, 2.0)}) == pytest.approx((2000 + 2 * 1000) / 1e6 / 2 * 1000)
    assert planned_cost_usd(plan, usage, 2, {}) is None
    assert planned_cost_usd(plan, {}, 2, {}) == 0.0
