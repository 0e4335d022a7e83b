"""Supervised rows, batches and updates on a tiny random model, and TRL's SFTTrainer as the reference."""

import pytest
import torch

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.dspy_jobs.data import end_of_turn
from fst_optimizer.dspy_jobs.settings import FinetuneSettings
from fst_optimizer.dspy_jobs.supervised import batches, likelihood, supervised_rows, updates
from fst_optimizer.model import lora
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import move_adapter


@pytest.fixture
def policy(tiny_model):
    made = Policy(tiny_model, lora=LoraConfig(rank=4, alpha=8), max_tokens=8)
    yield made
    made.close()


def test_the_last_answer_and_the_end_of_the_turn_are_learned_and_the_rest_is_prompt(policy):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "second\n"},
    ]
    (one,) = supervised_rows(policy, [{"messages": messages}])
    decode = policy.tokenizer.decode
    assert decode(one.call.completion_ids) == "second<|im_end|>"
    assert decode(one.call.prompt_ids).endswith(
        "first<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (one.advantage, len(one.call.logprobs)) == (1.0, len(one.call.completion_ids))


def test_the_end_of_the_turn_is_the_token_that_the_template_writes(policy):
    tokenizer = policy.tokenizer
    assert end_of_turn(policy) == tokenizer.eos_token_id
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    policy.model.get_base_model().generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert end_of_turn(policy) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<|im_start|>{% endfor %}"
    assert end_of_turn(policy) == other


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    settings = FinetuneSettings(epochs=3, batch_size=4, seed=1)
    made = list(batches(10, settings))
    assert [len(batch) for batch in made] == [4, 4, 2] * 3
    epochs = [[*made[start], *made[start + 1], *made[start + 2]] for start in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert made == list(batches(10, settings))
    assert made != list(batches(10, FinetuneSettings(epochs=3, batch_size=4, seed=2)))


def test_the_loss_is_minus_the_log_probability():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    loss, ratio, clipped = likelihood(logprobs, torch.zeros(2, 2), torch.ones(2))
    assert loss.tolist() == [[1.0, 2.0], [0.5, 0.0]]
    assert ratio.tolist() == [[1.0, 1.0]] * 2
    assert not clipped.any()
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, -1.0]] * 2


def test_an_update_has_the_loss_and_the_gradient_of_trls_sft_trainer(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    move_adapter(policy, size=0.1)
    start = lora.snapshot(policy.model)
    questions = ["a", "b " * 30, "why? " * 9]
    rows = supervised_rows(
        policy,
        [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in zip(questions, ("one", "two, and much more " * 3, "x"), strict=True)
        ],
    )
    gradients = []

    def keep(*_):
        gradients.append({name: p.grad.clone() for name, p in lora.trained_parameters(policy.model).items()})

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    (report,) = updates(policy, rows, FinetuneSettings.read({"epochs": 1, "max_grad_norm": None}))
    lora.restore(policy.model, start)
    theirs = SFTTrainer(
        policy.model,
        SFTConfig(
            str(tmp_path), max_steps=1, logging_steps=1, max_grad_norm=0.0, bf16=False, gradient_checkpointing=False,
            use_cpu=True, save_strategy="no", report_to=[], max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "input_ids": [*row.call.prompt_ids, *row.call.completion_ids],
                    "labels": [-100] * len(row.call.prompt_ids) + list(row.call.completion_ids),
                }
                for row in rows
            ]
        ),
        processing_class=policy.tokenizer,
    )  # fmt: skip
    theirs.train()
    assert report.loss == pytest.approx(theirs.state.log_history[0]["loss"], abs=1e-6)
    ours, reference = gradients
    assert max(gradient.abs().max() for gradient in reference.values()) > 1e-3
    for name, gradient in reference.items():
        assert torch.allclose(ours[name], gradient, rtol=0, atol=1e-6)
