"""Programs of which only a part learns: frozen LMs, judges, roles of predictors, teachers, credit by predictor."""

import dspy
import pytest

from fst_optimizer import UserError, load
from fst_optimizer.errors import EngineError
from fst_optimizer.store.files import read_json
from fst_optimizer.store.meter import cost_usd
from fst_optimizer.testing import chat_answer
from fst_optimizer.train.trainer import Trainer
from fst_optimizer.types import Usage
from helpers.toy import RULE, SHORT, TRAIN, VAL, Program, coin, frozen, metric, optimizer, student_of


@pytest.fixture
def policy(scripted):
    return scripted(coin)


@pytest.fixture
def trained(monkeypatch):
    """The rows of every slow step."""
    steps, step = [], Trainer.step

    def spy(self, rows):
        steps.append(list(rows))
        return step(self, rows)

    monkeypatch.setattr(Trainer, "step", spy)
    return steps


def compile_(student, tmp_path, *, metric=metric, teacher=None, run="run", **values):
    fst = optimizer(tmp_path / run, metric=metric, settings=SHORT, values=values)
    return fst.compile(student, trainset=TRAIN, valset=VAL, teacher=teacher)


# -- LMs that are not trained -----------------------------------------------------------------------------------


def test_calls_of_a_frozen_lm_are_run_counted_and_priced_and_never_trained(policy, tmp_path, trained):
    lm, engine = frozen()
    result = compile_(student_of(policy, first=lm), tmp_path).detailed_results.result
    rows = [row for step in trained for row in step]
    assert rows and {row.call.predictor for row in rows} == {"second"}
    executed = sum(result["rollouts"][kind] for kind in ("fast", "slow", "eval"))
    assert engine.calls == executed > 0
    used = {"calls": executed, "prompt_tokens": 100 * executed, "cached_tokens": 0, "completion_tokens": 10 * executed}
    used["untold"] = 0
    assert result["lm_usage"] == {"openai/gpt-4o-mini": used}
    # 15 cents a million prompt tokens and 60 a million completion tokens, by litellm's table.
    assert result["cost_usd"] == pytest.approx(executed * (100 * 0.15 + 10 * 0.60) / 1e6)


def test_a_frozen_predictors_instruction_evolves_too(policy, tmp_path):
    lm, _ = frozen(answer=lambda request: chat_answer(middle="right" if RULE in str(request) else "wrong"))
    result = compile_(student_of(policy, first=lm), tmp_path, **MANY)
    candidates = read_json(tmp_path / "run" / "population" / "cycle-000000.json")["candidates"]
    assert any(RULE in candidate["texts"]["first"] for candidate in candidates)
    assert result.first.lm is lm


def test_a_judges_calls_are_priced_and_never_trained(policy, tmp_path, trained):
    lm, engine = frozen()
    judge = dspy.Predict("question, answer -> score: float")
    judge.lm = lm

    def judged(example, prediction, trace=None):
        return judge(question=example.question, answer=prediction.answer).score + (prediction.answer == "right") / 2

    result = compile_(student_of(policy), tmp_path, metric=judged).detailed_results.result
    assert {row.call.predictor for step in trained for row in step} == {"first", "second"}
    assert engine.calls == result["lm_usage"]["openai/gpt-4o-mini"]["calls"]
    assert engine.calls == sum(result["rollouts"][kind] for kind in ("fast", "slow", "eval"))
    assert result["cost_usd"] > 0


def test_the_policys_base_as_a_judge_is_never_trained(policy, tmp_path, trained):
    judge = dspy.Predict("question, given -> answer")
    judge.lm = policy.base_lm

    def judged(example, prediction, trace=None):
        return (judge(question=example.question, given=prediction.answer).answer == "right") / 2 + (
            prediction.answer == "right"
        ) / 2

    result = compile_(student_of(policy), tmp_path, metric=judged).detailed_results.result
    assert sum(len(step) for step in trained) <= 2 * result["rollouts"]["slow"]
    assert {row.call.predictor for step in trained for row in step} == {"first", "second"}
    assert result["lm_usage"] == {} and result["cost_usd"] == 0.0


def test_a_price_that_is_given_counts_and_one_that_is_unknown_is_null(policy, tmp_path):
    lm, engine = frozen("openai/nobody-knows-5.5")
    result = compile_(student_of(policy, first=lm), tmp_path).detailed_results.result
    assert result["cost_usd"] is None
    calls = engine.calls
    prices = {"budget.prices.openai/nobody-knows-5.5": [2.0, 8.0]}
    result = compile_(student_of(policy, first=lm), tmp_path, run="priced", **prices).detailed_results.result
    assert result["cost_usd"] == pytest.approx((engine.calls - calls) * (100 * 2.0 + 10 * 8.0) / 1e6)


@pytest.mark.parametrize(
    ("model", "used", "expected"),
    [
        ("hosted_vllm/own", Usage(1, 500, 0, 500), 0.0),
        ("openai/gpt-4o-mini", Usage(1, 10**6, 0, 0), 0.15),
        ("openai/gpt-4o-mini", Usage(1, 10**6, 10**6, 0), 0.075),
        ("openai/gpt-4o-mini", Usage(1, 0, 0, 10**6), 0.60),
        ("openai/gpt-4o-mini", Usage(3, 0, 0, 0), None),
        ("nobody/knows", Usage(1, 5, 0, 5), None),
    ],
)
def test_prices_are_those_of_litellms_table_and_own_servers_cost_nothing(model, used, expected):
    assert cost_usd({model: used}, {}) == (None if expected is None else pytest.approx(expected))


def test_one_unknown_price_makes_the_whole_unknown():
    assert cost_usd({"a/b": Usage(1, 1, 0, 1), "hosted_vllm/own": Usage(1, 1, 0, 1)}, {}) is None
    assert cost_usd({}, {}) == 0.0


def test_a_frozen_lm_that_refuses_costs_its_rollout_and_nobody_is_blamed(policy, tmp_path, trained):
    lm, _ = frozen(fails_at=range(6, 9))
    student = student_of(policy, first=lm)
    result = compile_(student, tmp_path, method="rl", **{"rollout.num_threads": 1}).detailed_results.result
    lines = (tmp_path / "run" / "rollouts" / "cycle-000000.jsonl").read_text()
    # Four calls validate, the next eight are the step's: three of those fail.
    assert (lines.count('"engine_error"'), lines.count('"ok"')) == (3, 5)
    assert sum(len(step) for step in trained) <= 5
    assert result["ended"] == "done"


def test_a_frozen_lm_that_always_refuses_stops_the_run_and_is_named(policy, tmp_path):
    lm, _ = frozen(fails_at="always")
    with pytest.raises(EngineError, match=r"all 4 rollouts: .*slow down"):
        compile_(student_of(policy, first=lm), tmp_path)


def test_a_frozen_lm_whose_answer_does_not_parse_is_told_to_the_reflector(policy, tmp_path):
    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.rollout.collector import Collector
    from fst_optimizer.rollout.metric import Metric
    from fst_optimizer.rollout.rollout import Request
    from fst_optimizer.types import Candidate, Outcome, items_of

    lm, _ = frozen(answer=lambda request: "no field here")
    program = student_of(policy, second=lm)
    collector = Collector(lambda candidate: program, policy, Metric(metric), FSTConfig())
    (rollout,) = collector.run(
        [Request(Candidate({"first": "Answer."}), items_of(TRAIN[:1], "train")[0])],
        version=0,
        temperature=1.0,
        capture=True,
    )
    assert rollout.outcome is Outcome.PARSE_ERROR
    first, failed = rollout.trace
    assert first.predictor == "first" and first.outputs
    assert (failed.predictor, failed.outputs, failed.completion) == ("second", None, "no field here")
    assert [call.predictor for call in rollout.calls] == ["first"]


def test_a_program_with_a_frozen_lm_is_loaded_with_it(policy, tmp_path):
    lm, _ = frozen()
    compile_(student_of(policy, first=lm), tmp_path)
    fresh = Program()
    fresh.first.lm = lm
    program = load(tmp_path / "run", program=fresh, model=policy.source)
    assert program.second.lm.engine.version == read_json(tmp_path / "run" / "result.json")["policy_version"]


# -- what may change ----------------------------------------------------------------------------------------------


def changed(result):
    return {name for name, text in result.detailed_results.result["candidate"].items() if text != "Answer."}


MANY = {"fast.max_rollouts": 60, "fast.max_proposals": 8, "fast.patience": 0}


@pytest.mark.parametrize(
    ("roles", "evolved", "learned"),
    [
        ({}, {"first", "second"}, {"first", "second"}),
        ({"first": "train"}, {"second"}, {"first", "second"}),
        ({"first": "evolve"}, {"first", "second"}, {"second"}),
        ({"first": "neither"}, {"second"}, {"second"}),
        ({"first": "train", "second": "evolve"}, {"second"}, {"first"}),
    ],
)
def test_each_predictor_changes_only_as_it_may(scripted, tmp_path, trained, roles, evolved, learned):
    def better_when_told(prompt, request):
        told = RULE in prompt
        knows = request.seed % 3 < 1 + told if request.temperature else told
        word = "right" if knows else "wrong"
        return chat_answer(middle=word, answer=word)

    policy = scripted(better_when_told)
    result = compile_(student_of(policy), tmp_path, **MANY, **{f"predictors.{name}": r for name, r in roles.items()})
    population = read_json(tmp_path / "run" / "population" / "cycle-000000.json")
    assert {n for c in population["candidates"] for n, text in c["texts"].items() if text != "Answer."} == evolved
    assert changed(result) <= evolved
    assert {row.call.predictor for step in trained for row in step} == learned
    assert read_json(tmp_path / "run" / "config.json")["config"]["predictors"] == roles


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"predictors.frist": "train"}, r"predictors\.frist: .*did you mean 'first'"),
        ({"predictors.first": "trian"}, r"predictors\.first is 'trian': did you mean 'train'"),
        (
            {"method": "rl", "predictors.first": "evolve", "predictors.second": "neither"},
            "let one of first, second train",
        ),
        ({"method": "gepa", "predictors.first": "train", "predictors.second": "train"}, "nothing to change"),
        ({"predictors.first": "neither", "predictors.second": "neither"}, "nothing to change"),
        ({"train.own_share": 1.5}, "share from 0 to 1"),
        ({"train.credit": "prediction"}, "did you mean 'predictor'"),
        ({"budget.prices.openai/x": [1.0]}, r"budget\.prices\.openai/x is \[1\.0\]: give two numbers"),
    ],
)
def test_roles_and_shares_that_make_no_sense_cost_nothing(policy, tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        compile_(student_of(policy), tmp_path, **values)
    assert policy.engine.requests == []


# -- credit by predictor -------------------------------------------------------------------------------------------


def test_credit_by_predictor_needs_a_metric_that_scores_predictors(policy, tmp_path):
    with pytest.raises(UserError, match=r"train\.credit is 'predictor', and the metric takes two arguments"):
        compile_(student_of(policy), tmp_path, metric=lambda example, prediction: 0.0, **{"train.credit": "predictor"})


def test_with_credit_by_predictor_each_call_is_judged_by_its_own_predictors_work(policy, tmp_path, trained):
    compile_(student_of(policy), tmp_path, method="rl", **{"train.credit": "predictor", "train.own_share": 1.0})
    rows = [row for step in trained for row in step]
    assert rows
    for row in rows:
        assert (row.advantage > 0) == ("right" in row.call.text)


# -- teachers -----------------------------------------------------------------------------------------------------


def told(policy, lm=None):
    teacher = student_of(policy) if lm is None else student_of(policy, first=lm, second=lm)
    for predictor in teacher.predictors():
        predictor.signature = predictor.signature.with_instructions(RULE)
        predictor.demos = [dspy.Example(question="q", middle="right", answer="right")]
    return teacher


def test_a_teachers_rollouts_join_every_group_and_its_calls_are_trained(policy, tmp_path, trained):
    values = {"method": "rl", "rollout.teacher_rollouts": 2}
    result = compile_(student_of(policy), tmp_path, teacher=told(policy), **values).detailed_results.result
    assert result["rollouts"]["slow"] == 2 * (4 + 2)
    texts = [policy.tokenizer.decode(row.call.prompt_ids) for step in trained for row in step]
    assert any(RULE in text for text in texts) and any(RULE not in text for text in texts)
    assert {row.call.policy_version for step in trained for row in step} == {0}
    assert RULE not in "".join(result["candidate"].values())


def test_a_teacher_at_another_version_is_sampled_from_that_version(policy, tmp_path, trained):
    from fst_optimizer.testing import move_adapter

    move_adapter(policy)
    policy.move_lm(policy.publish())
    teacher = told(policy, policy.lm_at(0))
    compile_(student_of(policy), tmp_path, teacher=teacher, method="rl", **{"budget.max_cycles": 2})
    rows = [row for step in trained for row in step]
    taught = {row.call.policy_version for row in rows if RULE in policy.tokenizer.decode(row.call.prompt_ids)}
    own = {row.call.policy_version for row in rows if RULE not in policy.tokenizer.decode(row.call.prompt_ids)}
    assert taught == {0} and 0 not in own


def test_a_teacher_on_another_model_is_refused(policy, tmp_path):
    lm, _ = frozen()
    with pytest.raises(UserError, match=r"none of the teacher's predictors .* uses the student's policy"):
        compile_(student_of(policy), tmp_path, teacher=told(policy, lm))
    with pytest.raises(UserError, match="teacher is str"):
        compile_(student_of(policy), tmp_path, teacher="teacher")


def test_the_teacher_itself_is_not_touched_and_counts_in_the_budget(policy, tmp_path):
    teacher = told(policy)
    before = teacher.dump_state()
    values = {"method": "rl", "budget.max_cycles": 9, "budget.max_rollouts": 25}
    result = compile_(student_of(policy), tmp_path, teacher=[teacher, told(policy)], **values).detailed_results.result
    assert teacher.dump_state() == before and not hasattr(teacher.first, "_fst_component")
    assert result["rollouts"]["slow"] == 2 * (2 * (4 + 2)) and result["ended"] == "budget"


def test_demos_stay_in_the_prompts_that_are_trained(policy, tmp_path, trained):
    student = student_of(policy)
    student.first.demos = [dspy.Example(question="an old one", middle="right")]
    result = compile_(student, tmp_path)
    texts = [
        policy.tokenizer.decode(row.call.prompt_ids) for s in trained for row in s if row.call.predictor == "first"
    ]
    assert texts and all("an old one" in text for text in texts)
    assert result.first.demos == student.first.demos
