"""Supervised tuning on right answers: what is learned is what a right rollout would have sampled."""

import json

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.lab.baseline import run
from fst_optimizer.lab.cells import comparison_jobs
from fst_optimizer.lab.compare import read_run, save_comparison
from fst_optimizer.lab.plan import Common, check_jobs
from fst_optimizer.lab.sft import learn, right_turns, settings_for, supervised_examples
from fst_optimizer.task_run import Sizes
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from helpers.collecting import collect
from helpers.runs import EXTRA, RL_CURVE, write_run
from helpers.toy import TRAIN, Program, metric, student_of

RIGHT = {"first": {"middle": "right"}, "second": {"answer": "right"}}


class ToyTask:
    """The toy program as a task that knows its answers."""

    name = "toy"

    def answers(self, example):
        return RIGHT


class ToyStart:
    """What `supervised_examples` reads of a start."""

    def __init__(self, policy, config):
        self.policy, self.config, self.task = policy, config, ToyTask()
        self.program, self.train = student_of(policy), TRAIN


def rightly(prompt, request):
    """What a policy says that is always right: the field that the prompt's last header asks for."""
    return chat_answer(middle="right") if "field `[[ ## middle ## ]]`" in prompt else chat_answer(answer="right")


def test_the_rows_are_token_for_token_the_calls_of_rollouts_that_are_right(scripted):
    policy = scripted(rightly)
    rollouts = collect(policy, Program(), metric, TRAIN)
    assert [rollout.score for rollout in rollouts] == [1.0] * len(TRAIN)
    rows = supervised_examples(ToyStart(policy, FSTConfig()))
    assert [[(row.call.prompt_ids, row.call.completion_ids) for row in own] for own in rows] == [
        [(call.prompt_ids, call.completion_ids) for call in rollout.calls] for rollout in rollouts
    ]
    assert {row.advantage for own in rows for row in own} == {1.0}


def test_a_predictor_that_is_not_trained_gives_no_rows_but_its_answer_is_read(scripted):
    policy = scripted(rightly)
    rows = supervised_examples(ToyStart(policy, FSTConfig().with_values({"predictors.first": "evolve"})))
    assert [len(own) for own in rows] == [1] * len(TRAIN)
    assert "[[ ## middle ## ]]\nright" in policy.decode(rows[0][0].call.prompt_ids)


def test_an_answer_that_is_missing_is_named(scripted):
    policy = scripted(rightly)
    with pytest.raises(UserError, match="task 'toy': its answers lack answer of predictor 'second'"):
        right_turns("toy", student_of(policy), TRAIN[0], {"first": {"middle": "right"}})


@pytest.mark.parametrize("name", ["programs/letters", "programs/letters:three-stage", "programs/letters:dedupe-sort"])
def test_what_a_task_calls_right_its_metric_calls_right(name, scripted):
    policy, task = scripted(rightly), load_task(name)
    program = task.build_program()
    program.set_lm(policy.lm)
    for example in task.load("train", 8):
        turns, prediction = right_turns(name, program, example, task.answers(example))
        assert task.metric(example, prediction).score == 1.0
        assert [predictor for predictor, _, _ in turns] == [name for name, _ in program.named_predictors()]


def test_a_judge_in_the_program_is_asked_and_not_answered_for(scripted):
    class Judged(dspy.Module):
        def __init__(self, judge):
            super().__init__()
            self.first = dspy.Predict("question -> middle")
            self.judge = dspy.Predict("middle -> answer")
            self.judge.lm = judge

        def forward(self, question):
            return self.judge(middle=self.first(question=question).middle)

    judge = dspy.utils.DummyLM([{"answer": "fine"}])
    program = Judged(judge)
    program.first.lm = scripted(rightly).lm
    turns, prediction = right_turns("judged", program, TRAIN[0], {"first": {"middle": "right"}})
    assert [name for name, _, _ in turns] == ["first"] and prediction.answer == "fine"


def test_it_sees_as_many_examples_as_the_others_make_rollouts():
    config = FSTConfig().with_values(
        {
            "budget.max_rollouts": 4000,
            "rollout.batch_size": 8,
            "train.kl_coef": 0.1,
            "train.entropy_coef": 0.1,
            "train.entropy_floor": 0.1,
            "train.epochs": 2,
            "train.target_kl": 0.01,
            "seed": 3,
        }
    )
    settings = settings_for(config, examples=512, rows=1024)
    # 4000 / 512 = 7.8: seven whole epochs. Two rows an example, eight examples an update.
    assert (settings.epochs, settings.batch_size, settings.seed) == (7, 16, 3)
    assert (settings.train.kl_coef, settings.train.entropy_coef, settings.train.loss) == (0.0, 0.0, "cispo")
    assert (settings.train.entropy_floor, settings.train.epochs, settings.train.target_kl) == (None, 1, None)
    assert settings.train.lr == config.train.lr
    assert settings_for(config.with_values({"budget.max_rollouts": 64}), 512, 512).epochs == 1


@pytest.mark.slow  # the letters model really learns
def test_a_run_learns_keeps_the_best_epoch_and_leaves_what_a_comparison_reads(tmp_path):
    sets = ("train.lr=2e-3", "train.warmup_steps=0", "rollout.batch_size=8")
    common = Common(192, sets, None, Sizes(64, 16, 16))
    (job,) = comparison_jobs("programs/letters:dedupe-sort", tmp_path, ("sft",), (3,), common, {})
    check_jobs([job])
    assert job.command()[:2] == ["fst_optimizer.lab.sft", "programs/letters:dedupe-sort"]
    run("sft", job.request, learn)
    check_jobs([job])  # it lies there with these settings
    found = read_run(job.folder)
    result = found.result
    assert result["rollouts"] == {"fast": 0, "slow": 0, "eval": result["rollouts"]["eval"], "reused": 0}
    # Validation before and after each of three epochs, the latter with its KL samples; two test sets.
    assert result["rollouts"]["eval"] == 16 + 3 * (16 + 16) + 2 * 16
    seen = result["supervised"]
    assert (seen["examples"], seen["epochs"], seen["examples_seen"], result["steps"]) == (64, 3, 192, 24)
    assert seen["loss_last"] < 0.5 * seen["loss_first"]
    scores = [line["score"] for line in map(json.loads, (job.folder / "metrics.jsonl").read_text().splitlines())]
    assert len(scores) == 4 and result["val_score_after"] == max(scores) > scores[0]
    assert result["candidate"] == {"first": "Answer the question."}

    write_run(tmp_path / "rl-seed3", "rl", 3, RL_CURVE)
    data = save_comparison([found, read_run(tmp_path / "rl-seed3")], tmp_path, extra=EXTRA)
    assert data["against_rl"] == {}  # without rollouts it reaches nothing sooner or later
    assert data["runs"][0]["told"] == {"feedback": False, "reflector": None, "answers": True, "instructions": False}
    assert data["runs"][0]["supervised"] == seen and data["runs"][0]["seconds"] is None
