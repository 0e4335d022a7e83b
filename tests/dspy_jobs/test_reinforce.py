"""Reinforce jobs, as dspy's GRPO drives them, on a tiny random model."""

import copy
import gc
import logging
from collections.abc import Mapping

import dspy
import pytest
import torch

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.engines.recorder import SETTING, Recorder
from fst_optimizer.errors import UserError
from fst_optimizer.model import lora
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import move_adapter
from fst_optimizer.train.trainer import Trainer

KWARGS = {"lr": 1e-2, "warmup_steps": 0}
QUESTION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b c"}]


@pytest.fixture
def policy(tiny_model):
    made = Policy(tiny_model, lora=LoraConfig(rank=4, alpha=8), max_tokens=8)
    yield made
    made.close()


@pytest.fixture
def trained(monkeypatch):
    """The rows of every update, as the trainer is given them."""
    seen = []
    step = Trainer.step

    def record(trainer, rows):
        seen.append(list(rows))
        return step(trainer, rows)

    monkeypatch.setattr(Trainer, "step", record)
    return seen


def ask(policy, count=1, **settings):
    return [policy.lm(messages=QUESTION, **settings)[0] for _ in range(count)]


def group(texts_and_rewards, messages=QUESTION):
    return [
        {"messages": messages, "completion": {"role": "assistant", "content": text}, "reward": reward}
        for text, reward in texts_and_rewards
    ]


def tensors_of(policy):
    return lora.snapshot(policy.model)


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def total(policy, call, tensors):
    return sum(policy.logprobs_of([call], tensors)[0])


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_what_was_sampled_is_trained_on_by_its_own_tokens_and_logprobs(policy, trained, monkeypatch):
    futures = []
    submit = policy.engine.submit
    monkeypatch.setattr(policy.engine, "submit", lambda request: futures.append(submit(request)) or futures[-1])
    move_adapter(policy)
    start = policy.publish()
    policy.move_lm(start)
    job = policy.lm.reinforce(KWARGS | {"temperature": 0.7})
    texts = ask(policy, 4)
    before = policy.tensors(start)
    job.step([{"batch_id": 0, "group": group(zip(texts, (1.0, 0.0, 0.0, 0.5), strict=True))}], "grpo_chat")
    (rows,) = trained
    assert [row.call.completion_ids for row in rows] == [future.result().completion_ids for future in futures]
    assert [row.call.logprobs for row in rows] == [future.result().logprobs for future in futures]
    assert {row.call.temperature for row in rows} == {0.7}
    assert {row.call.policy_version for row in rows} == {start}
    assert {row.call.prompt_ids for row in rows} == {policy.encode_chat(QUESTION)}
    for row, logprobs in zip(rows, policy.logprobs_of([row.call for row in rows], before), strict=True):
        assert row.call.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert job.counts == {"matched": 4, "tokenized": 0, "groups": 1, "flat_groups": 0}


def test_text_that_nobody_sampled_is_tokenized_and_scored_by_the_trainer(policy, trained):
    move_adapter(policy)
    start = policy.publish()
    policy.move_lm(start)
    job = policy.lm.reinforce(KWARGS | {"temperature": 0.5})
    sampled = ask(policy)[0]
    tensors = policy.tensors(start)
    job.step([group([(sampled, 0.0), ("by hand\n", 1.0)])])
    _, row = trained[0]
    tokenizer = policy.tokenizer
    assert row.call.completion_ids == (*tokenizer("by hand")["input_ids"], tokenizer.eos_token_id)
    assert row.call.temperature == 0.5
    assert row.call.logprobs == pytest.approx(policy.logprobs_of([row.call], tensors)[0], abs=1e-5)
    assert job.counts == {"matched": 1, "tokenized": 1, "groups": 1, "flat_groups": 0}


def test_advantages_are_over_each_group_of_its_own(policy, trained):
    job = policy.lm.reinforce(KWARGS)
    job.step([group([("a", 1.0), ("b", 0.0)]), group([("a", 7.0), ("b", 3.0), ("c", 5.0), ("d", 5.0)])])
    spread = 2**0.5
    expected = [0.5 / 0.5001, -0.5 / 0.5001, 2 / (spread + 1e-4), -2 / (spread + 1e-4), 0, 0]
    assert [row.advantage for row in trained[0]] == pytest.approx(expected)
    assert [row.rollout for row in trained[0]] == [0, 1, 2, 3, 4, 5]


def test_flat_groups_change_nothing(policy, trained):
    move_adapter(policy)
    start = policy.publish()
    policy.move_lm(start)
    before = tensors_of(policy)
    job = policy.lm.reinforce(KWARGS)
    job.step([group([("a", 1.0), ("b", 1.0)]), group([("a", 0.0)])])
    assert trained == [[]]
    assert same(before, tensors_of(policy))
    assert (policy.version, job.version) == (start, start)
    assert job.counts == {"matched": 0, "tokenized": 0, "groups": 2, "flat_groups": 2}


@pytest.mark.parametrize("values", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_a_penalty_or_a_bonus_acts_on_flat_groups(policy, trained, values):
    job = policy.lm.reinforce(KWARGS | values)
    job.step([group([("a", 1.0), ("b", 1.0)])])
    assert [(row.advantage, row.flat) for row in trained[0]] == [(0.0, True)] * 2
    assert job.report.updated and job.counts["flat_groups"] == 1


def test_dr_grpo_does_not_divide_by_the_groups_spread(policy, trained):
    job = policy.lm.reinforce(KWARGS | {"loss": "dr_grpo"})
    job.step([group([("a", 1.0), ("b", 0.5)])])
    assert [row.advantage for row in trained[0]] == [0.25, -0.25]


def test_greedy_completions_are_left_out_and_told_of_once(policy, trained, caplog):
    job = policy.lm.reinforce(KWARGS)
    greedy, sampled = ask(policy, temperature=0.0)[0], ask(policy)[0]
    job.step([group([(greedy, 1.0), (sampled, 0.0)]), group([(sampled, 1.0), (greedy, 0.0)])])
    assert {row.call.temperature for row in trained[0]} == {1.0}
    assert (job.greedy, len(trained[0])) in ((1, 3), (2, 2))  # a text that comes again may be matched once only
    assert sum("temperature 0 are not trained on" in one.getMessage() for one in caplog.records) == 1


def test_a_step_raises_the_probability_of_what_was_rewarded_and_publishes_the_next_version(policy, trained):
    job = policy.lm.reinforce(KWARGS)
    texts = ask(policy, 2)
    job.step([group([(texts[0], 1.0), (texts[1], 0.0)])])
    good, bad = (row.call for row in trained[0])
    assert policy.version == job.version == 1
    assert total(policy, good, policy.tensors(1)) > total(policy, good, None) + 0.1
    assert total(policy, bad, policy.tensors(1)) < total(policy, bad, None) - 0.1
    job.step([group([(texts[0], 1.0), (texts[1], 0.0)])])
    assert policy.version == 2
    assert total(policy, good, policy.tensors(2)) > total(policy, good, policy.tensors(1))


def test_groups_that_dspy_hands_in_again_are_trained_on_once(policy, trained):
    job = policy.lm.reinforce(KWARGS)
    first, second = group([("a", 1.0), ("b", 0.0)]), group([("c", 1.0), ("d", 0.0)])
    third = group([("e", 1.0), ("f", 0.0)])
    job.step([{"batch_id": number, "group": one} for number, one in enumerate((first, second, first, second))])
    job.step([{"batch_id": number, "group": one} for number, one in enumerate((second, third, third))])
    job.step([third])
    assert [len(rows) for rows in trained] == [4, 2, 2]
    assert [row.group for row in trained[0]] == [0, 0, 1, 1]
    assert [row.call.text for row in trained[1]] == ["e", "f"]


def test_a_prompt_that_was_never_asked_is_told_once(policy, caplog):
    job = policy.lm.reinforce(KWARGS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            job.step([group([("a", 1.0), ("b", 0.0)])])
    assert [record for record in caplog.records if "adapter=dspy.ChatAdapter()" in record.message] == caplog.records[:1]


# --- Which LM serves what --------------------------------------------------------------------------------------------


def test_after_a_step_the_lm_and_its_shallow_copies_serve_the_new_version(policy):
    cooler = policy.lm.copy(temperature=0.3)
    job = policy.lm.reinforce(KWARGS)
    job.step([group([("a", 1.0), ("b", 0.0)])])
    assert (policy.lm.version, cooler.version) == (1, 1)
    assert cooler.kwargs["temperature"] == 0.3


def test_a_program_copied_before_the_job_keeps_its_weights(policy):
    program = dspy.Predict("question -> answer")
    program.set_lm(policy.lm)
    before = program.deepcopy()
    job = program.lm.reinforce(KWARGS)
    after = program.deepcopy()
    for _ in range(3):
        job.step([group([("a", 1.0), ("b", 0.0)])])
    job.terminate()
    assert program.lm is policy.lm
    assert (before.lm.version, after.lm.version, program.lm.version) == (0, 3, 3)
    assert before.lm is not program.lm
    assert policy.engine.versions() == {0, 3}


def test_a_copied_program_is_trained_without_its_original(policy):
    program = dspy.Predict("question -> answer")
    program.set_lm(policy.lm)
    copied = program.deepcopy()
    job = copied.lm.reinforce(KWARGS)
    for _ in range(2):
        job.step([group([("a", 1.0), ("b", 0.0)])])
    job.terminate()
    assert (program.lm.version, copied.lm.version, policy.version) == (0, 2, 2)


def test_an_lm_at_a_version_is_trained_from_there_and_moves_on(policy):
    move_adapter(policy, seed=1)
    first = policy.publish()
    move_adapter(policy, seed=2)
    policy.publish()
    lm = policy.lm_at(first)
    kept = copy.deepcopy(lm)
    job = lm.reinforce(KWARGS | {"lr": 1e-9})
    job.step([group([("a", 1.0), ("b", 0.0)])])
    assert (lm.version, kept.version, policy.version) == (3, first, 3)
    moved = policy.tensors(3)
    assert all(torch.allclose(tensor, moved[name], atol=1e-6) for name, tensor in policy.tensors(first).items())
    job.step([group([("a", 1.0), ("b", 0.0)])])
    assert (lm.version, kept.version) == (4, first)


def test_a_step_goes_on_from_its_own_weights_whatever_happened_to_the_adapter(policy):
    job = policy.lm.reinforce(KWARGS | {"lr": 1e-9})
    job.step([group([("a", 1.0), ("b", 0.0)])])
    move_adapter(policy, size=5.0)
    job.step([group([("a", 1.0), ("b", 0.0)])])
    assert all(tensor.abs().max() < 1e-6 for name, tensor in policy.tensors(2).items() if ".lora_B." in name)


# --- What is sampled and remembered meanwhile -----------------------------------------------------------------------


def test_calls_sample_while_a_job_runs_and_are_greedy_again_after_it(scripted):
    policy = scripted(lambda prompt, request: "x")

    def asked(lm, **settings):
        lm("a", **settings)
        return policy.engine.requests[-1].temperature

    job = policy.lm.reinforce({})
    assert asked(policy.lm) == 1.0
    assert asked(policy.lm.copy(temperature=0.2)) == 0.2
    assert asked(policy.lm, temperature=0.0) == 0.0
    assert asked(policy.base_lm) == 0.0
    job.terminate()
    assert asked(policy.lm) == 0.0


@pytest.mark.parametrize(
    ("own", "given", "expected"), [(0.0, {}, 1.0), (0.6, {}, 0.6), (0.6, {"temperature": 0.9}, 0.9)]
)
def test_the_temperature_is_the_jobs_else_the_policys_else_one(scripted, own, given, expected):
    policy = scripted(lambda prompt, request: "x", temperature=own)
    job = policy.lm.reinforce(given)
    policy.lm("a")
    assert policy.engine.requests[-1].temperature == expected
    job.terminate()


def test_only_the_calls_of_a_running_job_are_remembered(scripted):
    policy = scripted(lambda prompt, request: "x")
    policy.lm("a")
    assert policy.observer is None
    job = policy.lm.reinforce({"memory": 3})
    memory = policy.observer
    policy.lm("a")
    policy.base_lm("a")
    with dspy.context(**{SETTING: Recorder(policy, 0, 1.0)}):
        policy.lm("a")
    assert len(memory) == 1
    for _ in range(5):
        policy.lm("a")
    assert len(memory) == 3
    job.terminate()
    policy.lm("a")
    assert policy.observer is None
    assert len(memory) == 3


def test_a_job_that_is_dropped_stops_remembering(scripted):
    policy = scripted(lambda prompt, request: "x")
    job = policy.lm.reinforce({})
    assert policy.observer is not None
    del job
    gc.collect()
    assert policy.observer is None


# --- The interface ---------------------------------------------------------------------------------------------------


def test_status_asks_for_new_groups_as_long_as_the_job_runs(policy):
    job = policy.lm.reinforce(KWARGS)
    first = job.get_status()
    job.step([group([("a", 1.0), ("b", 0.0)])])
    second = job.status()
    assert isinstance(first, Mapping)
    assert (first["current_model"], second["current_model"]) == ("policy-000000", "policy-000001")
    assert len(first["pending_batch_ids"]) == len(second["pending_batch_ids"]) > 100
    assert not set(first["pending_batch_ids"]) & set(second["pending_batch_ids"])
    job.cancel()
    job.terminate()
    assert (job.status()["status"], job.status()["pending_batch_ids"]) == ("succeeded", [])


def test_checkpoints_are_adapters_on_disk(policy, tmp_path):
    job = policy.lm.reinforce(KWARGS | {"output_dir": str(tmp_path)})
    with pytest.raises(UserError, match="version 0"):
        job.save_checkpoint("one")
    job.step([group([("a", 1.0), ("b", 0.0)])])
    job.save_checkpoint("one")
    assert same(lora.load_adapter_tensors(tmp_path / "one"), policy.tensors(1))
    assert job.get_status()["checkpoints"] == {"one": str(tmp_path / "one")}
    assert job.get_status()["last_checkpoint"] == "one"


def test_checkpoints_need_a_folder(policy):
    with pytest.raises(UserError, match="output_dir is None"):
        policy.lm.reinforce(KWARGS).save_checkpoint("one")


def test_frozen_and_foreign_lms_are_refused(policy):
    from fst_optimizer.dspy_jobs.reinforce import PolicyReinforceJob

    with pytest.raises(UserError, match="frozen use of a policy"):
        policy.base_lm.reinforce({})
    with pytest.raises(UserError, match=r"'openai/gpt-5' cannot be trained by reinforce.*set_lm\(policy\.lm\)"):
        PolicyReinforceJob(dspy.LM("openai/gpt-5"))


def test_a_retired_version_is_refused(policy):
    move_adapter(policy)
    lm = policy.lm_at(policy.publish())
    policy._pinned.clear()
    policy.restore(0, None)
    policy.retire_all_but(())
    with pytest.raises(UserError, match="does not serve any more"):
        lm.reinforce({})


def test_unknown_train_kwargs_are_refused_before_anything_is_sampled(policy):
    with pytest.raises(UserError, match="did you mean 'kl_coef'"):
        policy.lm.reinforce({"kl_coeff": 0.1})
    assert policy.observer is None


def test_a_job_that_does_not_run_refuses_steps(policy):
    job = policy.lm.reinforce(KWARGS)
    job.terminate()
    with pytest.raises(UserError, match="does not run"):
        job.step([group([("a", 1.0), ("b", 0.0)])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "train_data is str"),
        ([{"batch_id": 0}], r"train_data\[0\] is no group"),
        ([[]], r"train_data\[0\] is no group"),
        ([[{"messages": QUESTION, "reward": 1.0}]], "group 0, completion 0 needs messages"),
        ([group([("a", float("nan"))])], "reward nan"),
        ([group([("a", 1.0)], messages=[])], "has messages"),
        ([group([("a", 1.0)], messages=[{"role": "tool", "content": "x"}])], "has message"),
        ([group([("a", 1.0)], messages=[{"role": "user", "content": [{"image": "x"}]}])], "has message"),
        ([group([(None, 1.0)])], "has completion"),
        ([group([("a" * 5000, 1.0), ("b", 0.0)])], "group 0, completion 0 has .* tokens"),
    ],
)
def test_data_of_another_shape_is_refused(policy, data, message):
    job = policy.lm.reinforce(KWARGS)
    with pytest.raises(UserError, match=message):
        job.step(data)
    assert policy.version == 0


def test_another_format_is_refused(policy):
    job = policy.lm.reinforce(KWARGS)
    with pytest.raises(UserError, match="train_data_format is 'chat'"):
        job.step([group([("a", 1.0), ("b", 0.0)])], dspy.clients.utils_finetune.TrainDataFormat.CHAT)
