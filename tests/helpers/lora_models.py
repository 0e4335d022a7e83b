"""Tiny LoRA models and training rows: fixtures for the tests of model/ and train/."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.model import lora
from fst_optimizer.types import Call, TrainRow

VOCABULARY, PAD = 64, 0


def _tiny_base(seed: int = 0) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.eval()
    return cast(Qwen3ForCausalLM, model)


def _moved(model: PeftModel, size: float = 0.1) -> PeftModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in lora.trained_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def _ragged_rows(count: int = 7, seed: int = 0, **call: object) -> list[TrainRow]:
    """Rows of mixed lengths, temperatures and advantages; two calls to a rollout, two rollouts to a group."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prompt, completion = rng.randrange(1, 12), rng.randrange(1, 9)
        settings = {
            "predictor": "answer",
            "prompt_ids": tuple(rng.randrange(1, VOCABULARY) for _ in range(prompt)),
            "completion_ids": tuple(rng.randrange(1, VOCABULARY) for _ in range(completion)),
            "logprobs": tuple(rng.uniform(-6, -2) for _ in range(completion)),
            "temperature": rng.choice((0.0, 0.7, 1.0, 1.3)),
            "policy_version": 0,
            "finish_reason": "stop",
        }
        rows.append(TrainRow(Call(**{**settings, **call}), rng.uniform(-1.5, 1.5), index // 2, index // 4))  # type: ignore[arg-type]
    return rows


def _slow_logprobs(model: PeftModel, row: TrainRow) -> torch.Tensor:
    ids = torch.tensor([[*row.call.prompt_ids, *row.call.completion_ids]])
    logits = model(input_ids=ids).logits[0] / (row.call.temperature or 1.0)
    positions = torch.arange(len(row.call.prompt_ids) - 1, ids.shape[1] - 1)
    return torch.log_softmax(logits, -1)[positions, ids[0, positions + 1]]


@pytest.fixture
def make_base() -> Callable[[], Qwen3ForCausalLM]:
    return _tiny_base


@pytest.fixture
def make_model() -> Callable[[], PeftModel]:
    """Always the same model, adapter included."""
    return lambda: lora.attach(_tiny_base(), LoraConfig(rank=4, alpha=8))


@pytest.fixture
def model(make_model: Callable[[], PeftModel]) -> PeftModel:
    return make_model()


@pytest.fixture
def moved() -> Callable[[PeftModel], PeftModel]:
    """Gives a model a random B, so that its policy is not the base."""
    return _moved


@pytest.fixture
def make_rows() -> Callable[..., list[TrainRow]]:
    return _ragged_rows


@pytest.fixture
def slow_logprobs() -> Callable[[PeftModel, TrainRow], torch.Tensor]:
    """The reference: one row, no padding, all logits."""
    return _slow_logprobs
