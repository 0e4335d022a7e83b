"""Finetune jobs, as dspy's BootstrapFinetune drives them, on a tiny random model."""

from concurrent.futures import CancelledError

import dspy
import pytest
import torch
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.dspy_jobs.supervised import supervised_rows
from fst_optimizer.errors import TrainingError, UserError
from fst_optimizer.model import lora
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import move_adapter

KWARGS = {"lr": 1e-2, "epochs": 4, "batch_size": 2}


@pytest.fixture
def policy(tiny_model):
    made = Policy(tiny_model, lora=LoraConfig(rank=4, alpha=8), max_tokens=8)
    yield made
    made.close()


def row(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


DATA = [row("a", "one"), row("b", "two, and more"), row("c", "three")]


def mean_nll(policy, data, tensors):
    logprobs = policy.logprobs_of([one.call for one in supervised_rows(policy, data)], tensors)
    return -sum(map(sum, logprobs)) / sum(map(len, logprobs))


def done(job):
    lm = job.result(timeout=60)
    job.thread.join()
    return lm


# --- Training --------------------------------------------------------------------------------------------------------


def test_finetuning_raises_the_likelihood_of_its_data_and_publishes_the_next_version(policy):
    job = policy.lm.finetune(DATA, TrainDataFormat.CHAT, KWARGS | {"batch_size": 3})
    lm = done(job)
    assert (lm.version, policy.version, policy.lm.version) == (1, 1, 0)
    assert lm.pinned
    assert job.losses[0] == pytest.approx(mean_nll(policy, DATA, None), abs=1e-4)
    assert mean_nll(policy, DATA, policy.tensors(1)) < job.losses[-1] < job.losses[0] - 0.5
    assert job.status() is TrainingStatus.succeeded


def test_the_result_keeps_the_lms_settings_and_stays_at_its_version(policy):
    lm = done(policy.lm.copy(temperature=0.4).finetune(DATA, "chat", KWARGS))
    assert lm.kwargs["temperature"] == 0.4
    move_adapter(policy)
    policy.publish()
    policy.retire_all_but({2})
    assert (lm.version, policy.lm.version, policy.latest_lm.version) == (1, 0, 2)
    assert isinstance(lm("a")[0], str)


def test_a_program_copied_before_keeps_its_weights_and_copies_share_the_policy(policy):
    program = dspy.Predict("question -> answer")
    program.set_lm(policy.lm)
    before = program.deepcopy()
    trained = done(program.deepcopy().lm.finetune(DATA, None, KWARGS))
    assert (before.lm.version, trained.version, policy.version) == (0, 1, 1)
    assert before.lm.engine.policy is trained.engine.policy is policy
    assert done(trained.finetune(DATA, None, KWARGS)).version == 2
    assert trained.version == 1


def test_jobs_at_once_each_start_from_the_version_that_their_lm_served(policy):
    one, other = (policy.lm.finetune(DATA, None, KWARGS | {"batch_size": 3}) for _ in range(2))
    versions = {done(one).version, done(other).version}
    assert versions == {1, 2}
    assert one.losses == other.losses
    again = policy.latest_lm.finetune(DATA, None, KWARGS | {"batch_size": 3})
    done(again)
    assert again.losses[0] < one.losses[-1]


def test_the_adapter_is_also_written_where_asked(policy, tmp_path):
    lm = done(policy.lm.finetune(DATA, None, KWARGS | {"output_dir": str(tmp_path / "adapter")}))
    written = lora.load_adapter_tensors(tmp_path / "adapter")
    assert all(torch.equal(tensor, written[name]) for name, tensor in policy.tensors(lm.version).items())


def test_what_goes_wrong_in_training_is_raised_by_the_result(policy):
    before = lora.snapshot(policy.model)
    job = policy.lm.finetune(DATA, None, KWARGS | {"lr": 1e30, "epochs": 9})
    with pytest.raises(TrainingError, match="not finite"):
        job.result(timeout=60)
    job.thread.join()
    assert job.status() is TrainingStatus.failed
    assert policy.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.snapshot(policy.model).items())


def test_a_cancelled_job_publishes_nothing(policy):
    with policy.jobs.training:
        job = policy.lm.finetune(DATA, None, KWARGS)
        assert job.status() is TrainingStatus.pending
        assert job.cancel()
    job.thread.join()
    with pytest.raises(CancelledError):
        job.result(timeout=60)
    assert (policy.version, job.losses, job.status()) == (0, [], TrainingStatus.cancelled)
    finished = policy.lm.finetune(DATA, None, KWARGS)
    done(finished)
    assert not finished.cancel()


# --- The interface ---------------------------------------------------------------------------------------------------


def test_frozen_lms_are_refused(policy):
    with pytest.raises(UserError, match="frozen use of a policy"):
        policy.base_lm.finetune(DATA, None, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_data is empty: no run of the teacher passed the metric"),
        ("text", "train_data is str"),
        ([{"prompt": "a"}], r"train_data\[0\] needs messages"),
        (
            [row("a", "b"), {"messages": row("a", "b")["messages"][:1]}],
            r"train_data\[1\] must end with the assistant's",
        ),
        ([{"messages": row("a", "b")["messages"][1:]}], "answer to something"),
        ([{"messages": [{"role": "user", "content": None}]}], "has message"),
        ([row("a", "b" * 5000)], r"train_data\[0\] has .* tokens and the model's context is 4096"),
    ],
)
def test_data_of_another_shape_is_refused_at_once(policy, data, message):
    with pytest.raises(UserError, match=message):
        policy.lm.finetune(data, TrainDataFormat.CHAT, KWARGS)


def test_other_formats_and_unknown_settings_are_refused_at_once(policy):
    with pytest.raises(UserError, match="train_data_format is 'completion'"):
        policy.lm.finetune(DATA, TrainDataFormat.COMPLETION, KWARGS)
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        policy.lm.finetune(DATA, TrainDataFormat.CHAT, {"epoch": 1})


def test_launch_and_kill_leave_the_lm_as_it_is(policy):
    policy.lm.kill()
    policy.lm.launch()
    assert isinstance(policy.lm("a")[0], str)
