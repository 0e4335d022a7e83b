import asyncio
import gc

import pytest
import torch

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import UserError
from fst_optimizer.model import lora
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import move_adapter

LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture
def policy(tiny_model):
    made = Policy(tiny_model, lora=LORA, max_tokens=8)
    yield made
    made.close()


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_policy_starts_from_an_existing_adapter_as_version_1(policy, tiny_model, tmp_path):
    move_adapter(policy)
    version = policy.publish()
    policy.save(tmp_path / "adapter")
    again = Policy(tiny_model, adapter=tmp_path / "adapter", max_tokens=8)
    try:
        assert again.version == 1
        assert same(policy.tensors(version), again.tensors(1))
        assert policy.latest_lm("a b c") == again.lm("a b c")
    finally:
        again.close()


def test_a_folder_without_an_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"adapter is .*no adapter_config\.json"):
        Policy(tiny_model, adapter=tmp_path)


def test_version_0_has_nothing_to_save(policy, tmp_path):
    with pytest.raises(UserError, match="version is 0"):
        policy.save(tmp_path / "adapter")


def test_going_back_to_the_base_gives_the_adapter_that_training_started_from(policy):
    start = lora.snapshot(policy.model)
    move_adapter(policy)
    policy.publish()
    assert not same(start, lora.snapshot(policy.model))
    policy.restore(0, None)
    assert same(start, lora.snapshot(policy.model))
    assert policy.version == 0


def test_published_versions_do_not_change_when_training_goes_on(policy):
    move_adapter(policy)
    version = policy.publish()
    before = {name: tensor.clone() for name, tensor in policy.tensors(version).items()}
    move_adapter(policy, seed=1)
    assert policy.publish() == version + 1
    assert same(before, policy.tensors(version))


def test_a_version_stays_served_as_long_as_a_program_is_at_it(policy):
    move_adapter(policy)
    kept, dropped = policy.publish(), policy.publish()
    lm = policy.lm_at(kept)
    policy.retire_all_but(())
    assert policy.engine.versions() == {0, kept}
    assert dropped not in policy.engine.versions()
    assert lm("a b c")
    del lm
    gc.collect()
    policy.retire_all_but(())
    assert policy.engine.versions() == {0}


def test_the_base_lm_is_the_base_whatever_was_published(policy):
    before = policy.lm("a b c")
    move_adapter(policy, size=5.0)
    policy.publish()
    assert policy.latest_lm("a b c") != before
    assert policy.base_lm("a b c") == before


def test_the_lm_answers_in_a_coroutine_too(policy):
    assert asyncio.run(policy.lm.acall("a b c")) == policy.lm("a b c")


def test_chat_template_arguments_reach_the_template(tiny_model):
    from transformers import AutoTokenizer

    policy = Policy(tiny_model, chat_template_args={"enable_thinking": False})
    try:
        policy.tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        policy.tokenizer.chat_template = "{{ 'think' if enable_thinking else 'answer' }}"
        assert policy.decode(policy.encode_chat([{"role": "user", "content": "a"}])) == "answer"
    finally:
        policy.close()


def test_kl_to_base_is_zero_at_the_base_and_above_it_after_training(policy):
    from fst_optimizer.types import Call

    calls = [Call("p", (5, 6, 7), (8, 9), (0.0, 0.0), 1.0, 0, "stop")]
    assert policy.kl_to_base(calls, 0) == 0
    move_adapter(policy)
    assert policy.kl_to_base(calls, policy.publish()) > 0


def test_dropout_of_the_adapter_is_for_training_alone(tiny_model):
    from fst_optimizer.types import Call

    calls = [Call("p", (5, 6, 7), (8, 9), (0.0, 0.0), 1.0, 0, "stop")]
    measured = []
    for dropout in (0.0, 0.5):
        with Policy(tiny_model, lora=LORA.changed(dropout=dropout), max_tokens=8) as policy:
            move_adapter(policy)
            version = policy.publish()
            measured.append((policy.kl_to_base(calls, version), policy.logprobs_of(calls, policy.tensors(version))))
    assert measured[0] == measured[1]
