"""The probe against a trainer that knows its log-probs, and servers that are right or wrong about them."""

from types import SimpleNamespace

import pytest
import torch

from fst_optimizer.engines.base import Generation
from fst_optimizer.engines.vllm.agreement import check_agreement, random_adapter, restart_hint
from fst_optimizer.errors import UserError

ZERO = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.zeros(4, 2)}


def trained(call, tensors):
    """Log-probs of a token that moves with temperature and adapter."""
    return [-1.0 / call.temperature - (0.5 if tensors else 0.0)] * len(call.completion_ids)


def probe(serve, dtype="float32", vocabulary=10):
    """Checks a server that gives the log-prob `serve(temperature, tensors)` for every token."""

    def sample(request, tensors):
        value = serve(request.temperature, tensors)
        return Generation((3, 4), (value, value), "length")

    engine = SimpleNamespace(
        submit=lambda request: SimpleNamespace(result=lambda: sample(request, None)),
        try_adapter=lambda tensors, request: sample(request, tensors),
    )
    embeddings = SimpleNamespace(weight=torch.zeros(vocabulary, 2))
    policy = SimpleNamespace(
        encode_chat=lambda messages: (1, 2),
        zero_adapter=ZERO,
        logprobs_of=lambda calls, tensors: [trained(call, tensors) for call in calls],
        source="some/model",
        dtype=dtype,
        model=SimpleNamespace(get_input_embeddings=lambda: embeddings),
    )
    check_agreement(policy, engine, "restart it")


def right(temperature, tensors):
    return -1.0 / temperature - (0.5 if tensors else 0.0)


def test_a_server_that_agrees_on_base_and_adapter_passes():
    probe(right)


@pytest.mark.parametrize(("off", "dtype", "passes"), [(0.009, "float32", True), (0.011, "float32", False)])
def test_float32_is_held_to_a_hundredth_of_a_nat(off, dtype, passes):
    holds(lambda temperature, tensors: right(temperature, tensors) + off, dtype, passes)


@pytest.mark.parametrize(("off", "passes"), [(0.09, True), (0.11, False)])
def test_half_precision_is_held_to_a_tenth(off, passes):
    holds(lambda temperature, tensors: right(temperature, tensors) + off, "bfloat16", passes)


def holds(serve, dtype, passes):
    if passes:
        probe(serve, dtype)
    else:
        with pytest.raises(UserError, match="nats a token"):
            probe(serve, dtype)


def test_raw_logprobs_are_those_at_temperature_one():
    with pytest.raises(UserError, match=r"before the temperature \(raw_logprobs\): restart it"):
        probe(lambda temperature, tensors: right(1.0, tensors))


def test_a_wrong_base_is_told_from_a_wrong_adapter():
    with pytest.raises(UserError, match=r"1 nats a token .* another base model.*'some/model' here; restart it"):
        probe(lambda temperature, tensors: right(temperature, tensors) - 1.0)
    with pytest.raises(UserError, match=r"0\.5 nats a token .* applies adapters otherwise"):
        probe(lambda temperature, tensors: right(temperature, None))


def test_a_token_that_the_trainer_does_not_know_is_another_base_model():
    with pytest.raises(UserError, match=r"inf nats a token .* another base model"):
        probe(right, vocabulary=4)


def test_the_probes_adapter_moves_the_policy_a_little_and_the_same_each_time():
    one, two = random_adapter(ZERO), random_adapter(ZERO)
    assert torch.equal(one["q.lora_A.weight"], ZERO["q.lora_A.weight"])
    assert torch.equal(one["q.lora_B.weight"], two["q.lora_B.weight"])
    assert 0 < one["q.lora_B.weight"].abs().max() < 0.1
    assert not ZERO["q.lora_B.weight"].any()


def test_the_hint_names_what_the_server_must_be_started_with():
    hint = restart_hint(9, 4, "bfloat16")
    assert "--max-lora-rank 16 --max-loras 6 " in hint
    assert "--dtype bfloat16" in hint
