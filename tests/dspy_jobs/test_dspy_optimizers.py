"""dspy's own optimizers on the letters model: they compile, and what they return runs with what it learned."""

import dspy
import pytest
from dspy.teleprompt.grpo import GRPO

from fst_optimizer import Policy
from fst_optimizer.dspy_jobs.reinforce import PolicyReinforceJob
from programs.letters import task

pytestmark = pytest.mark.slow  # the letters model really learns

RULE = "Sort the letters, then move the first letter to the end."


@pytest.fixture
def policy():
    made = Policy(task.model(), max_tokens=task.MAX_TOKENS)
    yield made
    made.close()


@pytest.fixture
def jobs(monkeypatch):
    """Every reinforce job that was started."""
    started = []
    initialize = PolicyReinforceJob.initialize
    monkeypatch.setattr(PolicyReinforceJob, "initialize", lambda job: started.append(job) or initialize(job))
    return started


def program(policy, variant="sort-rotate", instruction=RULE):
    made = task.build_program(variant)
    for predictor in made.predictors():
        predictor.signature = predictor.signature.with_instructions(instruction)
    made.set_lm(policy.lm)
    return made


def examples(split, size, variant="sort-rotate"):
    return task.load(split, size, variant=variant)


def score(example, prediction, trace=None):
    return float(task.metric(example, prediction).score)


def right(example, prediction, trace=None):
    return score(example, prediction) == 1.0


def mean(made, devset):
    return dspy.Evaluate(devset=devset, metric=score, num_threads=8)(made).score


def grpo(train_kwargs, adapter=None, rollouts=4):
    return GRPO(
        metric=score,
        adapter=adapter,
        exclude_demos=True,
        num_train_steps=2,
        num_dspy_examples_per_grpo_step=3,
        num_rollouts_per_grpo_step=rollouts,
        num_threads=8,
        train_kwargs=train_kwargs,
    )


def finetune(**settings):
    return dspy.BootstrapFinetune(metric=right, num_threads=8, train_kwargs={"lr": 1e-3}, **settings)


def test_grpo_trains_every_predictor_on_what_was_sampled(policy, jobs):
    compiled = grpo({"lr": 2e-3, "warmup_steps": 0}, dspy.ChatAdapter()).compile(
        program(policy, "pipeline"), trainset=examples("train", 6, "pipeline")
    )
    (job,) = jobs
    # dspy drops the second predictor's group where the first one's answer could not be parsed in one of the rollouts,
    # and gives an answer that only JSONAdapter's second try made to ChatAdapter's prompt.
    assert 2 * 3 <= job.counts["groups"] <= 2 * 2 * 3
    assert job.counts["tokenized"] <= 0.2 * job.counts["matched"]
    assert policy.version == 2
    assert {predictor.lm.version for predictor in compiled.predictors()} == {2}
    assert compiled(**examples("val", 1)[0].inputs()).answer


def test_grpo_without_an_adapter_writes_other_prompts_and_trains_all_the_same(policy, jobs):
    grpo({"lr": 2e-3}).compile(program(policy), trainset=examples("train", 3))
    (job,) = jobs
    assert job.counts["matched"] == 0
    assert job.counts["tokenized"] > 0
    assert policy.version == 2


def test_bootstrap_finetune_learns_from_the_runs_that_were_right(policy):
    held_out = examples("val", 48)
    before = mean(program(policy), held_out)
    compiled = finetune().compile(program(policy), trainset=examples("train", 48))
    assert (compiled.first.lm.version, policy.version) == (1, 1)
    assert mean(compiled, held_out) > before + 5


def test_bootstrap_finetune_gives_each_predictor_weights_of_its_own_if_asked(policy):
    optimizer = dspy.BootstrapFinetune(metric=None, multitask=False, num_threads=8, train_kwargs={"epochs": 1})
    compiled = optimizer.compile(program(policy, "pipeline"), trainset=examples("train", 4, "pipeline"))
    assert {predictor.lm.version for predictor in compiled.predictors()} == {1, 2}
    assert compiled(**examples("val", 1)[0].inputs()).answer


def test_better_together_returns_the_best_program_with_the_weights_it_was_scored_with(policy):
    devset = examples("val", 24)
    optimizer = dspy.BetterTogether(
        metric=score,
        p=dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=1, max_labeled_demos=0),
        w=finetune(),
        g=grpo({"lr": 2e-3}, dspy.ChatAdapter(), rollouts=8),
    )
    best = optimizer.compile(
        program(policy), trainset=examples("train", 32), valset=devset, strategy="w -> g -> p", num_threads=8
    )
    assert not best.flag_compilation_error_occurred
    tried = {entry["strategy"]: entry for entry in best.candidate_programs}
    versions = {name: entry["program"].first.lm.version for name, entry in tried.items()}
    assert versions == {"": 0, "w": 1, "w -> g": policy.version, "w -> g -> p": policy.version}
    assert policy.version > 1
    for entry in tried.values():
        assert mean(entry["program"], devset) == pytest.approx(entry["score"], abs=0.01)
    assert mean(best, devset) == pytest.approx(max(entry["score"] for entry in tried.values()), abs=0.01)
    assert len(tried["w -> g -> p"]["program"].first.demos) == 1
