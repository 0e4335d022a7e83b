"""Runs whose groups are all flat, on a model that really samples: what they draw, and what acts on the weights."""

import dspy
import pytest

from fst_optimizer import FST, FSTConfig, Policy, UserError
from fst_optimizer.failpoints import inject
from fst_optimizer.store.files import RunFiles
from fst_optimizer.store.metrics import read_metrics
from helpers.toy import assert_same_run, coin, run_toy

STEPS = 4
SETTINGS = {
    "method": "rl",
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": 4},
    "train": {"steps_per_cycle": STEPS, "lr": 0.05, "warmup_steps": 0},
    "eval": {"kl_examples": 2},
    "budget": {"max_cycles": 1},
    "run": {"dry_run": False},
    "monitors": {"flat": "off"},
}
EXAMPLES = [dspy.Example(question=f"q{n}").with_inputs("question") for n in range(4)]


class Guess(dspy.Module):
    """One call, whose answer a random model cannot format: the program goes on without it."""

    def __init__(self):
        super().__init__()
        self.say = dspy.Predict("question -> answer")

    def forward(self, question):
        try:
            return self.say(question=question)
        except Exception:
            return dspy.Prediction(answer="")


def same(example, prediction, trace=None, pred_name=None, pred_trace=None):
    return 0.5


@pytest.fixture
def run(tiny_model):
    """Runs `Guess` under a metric that gives every answer the same score; each step is an epoch. What it sampled."""

    def start(run_dir, values=None, *, program=None, metric=same, sampled=None, killed_after=None, **options):
        policy = Policy(tiny_model, max_tokens=6)
        sampled = [] if sampled is None else sampled

        def heard(rollout):
            if len(sampled) == killed_after:
                raise KeyboardInterrupt
            sampled.append(rollout)
            return rollout

        program = program or Guess()
        program.set_lm(policy.lm)
        config = FSTConfig.from_dict(SETTINGS).with_values(values or {})
        fst = FST(metric, config=config, run_dir=run_dir, progress=False, **options)
        try:
            with inject("rollout.end", heard):
                fst.compile(program, trainset=EXAMPLES[:2], valset=EXAMPLES[2:])
        finally:
            policy.close()
        return sampled

    return start


def slow_texts(sampled):
    """Epoch by epoch, the tokens of each rollout of training."""
    slow = [one for one in sampled if one.example_id.startswith("train-") and one.calls[0].temperature == 1.0]
    size = 2 * SETTINGS["rollout"]["group_size"]
    epochs = [slow[start : start + size] for start in range(0, len(slow), size)]
    return [{(one.example_id, one.index): one.calls[0].completion_ids for one in epoch} for epoch in epochs]


def drawn_as(rollout):
    return rollout.example_id, rollout.index, rollout.calls[0].completion_ids


def steps(run_dir):
    return [line for line in read_metrics(RunFiles(run_dir).metrics) if line["kind"] == "step"]


def test_a_flat_epoch_does_not_repeat_itself(run, tmp_path):
    epochs = slow_texts(run(tmp_path / "run"))
    assert [line["flat_groups"] for line in steps(tmp_path / "run")] == [2] * STEPS
    assert len(epochs) == STEPS
    for number, epoch in enumerate(epochs):
        for other in epochs[:number]:
            assert epoch.keys() == other.keys()
            assert sum(epoch[key] == other[key] for key in epoch) <= 1  # six random bytes hardly ever agree


def test_a_killed_flat_run_draws_the_same_again(run, tmp_path):
    whole = run(tmp_path / "whole")
    parts = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", sampled=parts, killed_after=22)  # in the third step
    assert len(parts) == 22
    run(tmp_path / "run", sampled=parts, resume=True)
    # What the journal had of that step was not sampled again, and nothing of an earlier step was taken for it.
    assert sorted(map(drawn_as, parts)) == sorted(map(drawn_as, whole))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_fast_rounds_that_sample_draw_anew_and_greedy_ones_do_not(scripted, tmp_path):
    def drawn(temperature):
        policy = scripted(coin)
        values = {"method": "gepa", "fast.temperature": temperature, "budget.max_cycles": 3}
        run_toy(tmp_path / str(temperature), policy, values=values)
        # Evaluations are greedy: what has a temperature is the fast rounds'.
        asked = [one for one in policy.engine.requests if one.temperature == temperature]
        assert len(asked) >= 30
        return [(one.prompt_ids, one.seed) for one in asked]

    sampled, greedy = drawn(1.0), drawn(0.0)
    assert len(set(sampled)) == len(sampled)
    assert len(set(greedy)) < len(greedy)


def test_another_runs_seed_draws_other_texts(run, tmp_path):
    one, other = (slow_texts(run(tmp_path / str(seed), {"seed": seed})) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("values", [{}, {"train.kl_coef": 0.1}, {"train.entropy_coef": 0.5}])
def test_what_does_not_come_from_rewards_acts_on_flat_groups_and_costs_nothing_when_off(run, tmp_path, values):
    run(tmp_path / "run", values)
    lines = steps(tmp_path / "run")
    assert [line["flat_groups"] for line in lines] == [line["groups"] for line in lines] == [2] * STEPS
    assert [line["updated"] for line in lines] == [bool(values)] * STEPS
    assert [line["policy_version"] for line in lines] == ([1, 2, 3, 4] if values else [0] * STEPS)
    assert [line["note"] for line in lines] == [("" if values else "every group was flat")] * STEPS
    if "train.entropy_coef" in values:
        assert lines[-1]["entropy"] > 0 and lines[-1]["grad_norm"] > 0


def greedy_program():
    program = Guess()
    program.say.config["temperature"] = 0.0
    return program


def test_a_student_whose_calls_are_all_greedy_is_refused_before_anything_is_spent(run, tmp_path):
    with pytest.raises(UserError, match=r"no weight would change: all calls at temperature 0 \(of 'say'\)"):
        run(tmp_path / "run", {"run.dry_run": True}, program=greedy_program())
    assert not (tmp_path / "run").exists()


def test_greedy_calls_are_told_of_once_and_no_weight_follows_them(run, tmp_path, caplog):
    run(
        tmp_path / "run", program=greedy_program(), metric=lambda example, prediction, *_: int(example.question[1:]) % 2
    )
    lines = steps(tmp_path / "run")
    assert [(line["greedy_calls"], line["updated"], line["policy_version"]) for line in lines] == [
        (8, False, 0)
    ] * STEPS
    assert {line["note"] for line in lines} == {"every group was flat or its calls greedy"}
    told = [one for one in caplog.records if one.getMessage().startswith("calls at temperature 0 (of 'say')")]
    assert len(told) == 1  # and once more at the end, with all that was warned of
