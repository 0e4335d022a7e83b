import logging

import pytest

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.dspy_jobs.settings import finetune_settings, reinforce_settings
from fst_optimizer.errors import UserError


def test_without_train_kwargs_a_step_is_our_slow_step():
    assert reinforce_settings(None).train == TrainConfig()
    assert reinforce_settings({"num_generations": 8}).num_generations == 8


def test_our_own_names_are_taken_as_they_are():
    settings = reinforce_settings(
        {"lr": 1e-4, "loss": "grpo", "kl_coef": 0.1, "ratio_cap": 3.0, "average": "rollout", "microbatch_tokens": 64,
         "gradient_checkpointing": True, "temperature": 0.8, "memory": 9}
    )  # fmt: skip
    assert settings.train == TrainConfig(
        lr=1e-4, loss="grpo", kl_coef=0.1, ratio_cap=3.0, average="rollout", microbatch_tokens=64,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert (settings.temperature, settings.memory) == (0.8, 9)


def test_trls_names_mean_what_they_mean_there():
    settings = reinforce_settings(
        {"learning_rate": 2e-5, "beta": 0.04, "adam_beta2": 0.99, "loss_type": "grpo", "epsilon": 0.1,
         "mask_truncated_completions": True, "scale_rewards": True, "lora": True, "max_prompt_length": None,
         "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
    )  # fmt: skip
    assert settings.train == TrainConfig(
        lr=2e-5, kl_coef=0.04, betas=(0.9, 0.99), loss="grpo", average="rollout", clip_low=0.1, clip_high=0.1,
        train_truncated=False, warmup_steps=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (
            {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3},
            {"loss": "grpo", "clip_low": 0.1, "clip_high": 0.3},
        ),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"loss": "cispo", "ratio_cap": 5.0}),
        ({"epsilon_high": 5.0}, {"ratio_cap": 5.0}),
        ({"epsilon_high": None}, {}),
    ],
)
def test_epsilon_high_is_cispos_cap_and_the_others_upper_clip(given, changed):
    assert reinforce_settings(given).train == TrainConfig(**changed)


def test_settings_of_other_trainers_that_change_nothing_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        reinforce_settings({"per_device_train_batch_size": 8, "bf16": True})
    assert [record.args[0] for record in caplog.records] == ["per_device_train_batch_size", "bf16"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "unknown 'learning_rat'; did you mean 'learning_rate'"),
        ({"steps_per_cycle": 3}, "unknown 'steps_per_cycle'"),
        ({"epochs": 3}, "unknown 'epochs'"),
        ({"lr": 1e-3, "learning_rate": 1e-3}, "both 'learning_rate' and 'lr'"),
        ({"lr": -1}, "train.lr is -1"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'"),
        ({"lora": False}, "lora is False"),
        ({"scale_rewards": "none"}, "scale_rewards is 'none'"),
        ({"max_completion_length": 512}, "set max_tokens on the Policy"),
        ({"num_generations": 1}, "num_rollouts_per_grpo_step"),
        ({"temperature": -1}, "temperature is -1"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_reinforce_settings_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        reinforce_settings(given)


def test_finetune_settings_by_either_name():
    own = finetune_settings({"lr": 1e-4, "epochs": 5, "batch_size": 8, "seed": 3})
    theirs = finetune_settings(
        {"learning_rate": 1e-4, "num_train_epochs": 5.0, "per_device_train_batch_size": 2,
         "gradient_accumulation_steps": 4, "seed": 3, "use_peft": True}
    )  # fmt: skip
    assert own == theirs
    assert (own.epochs, own.batch_size, own.train.lr, own.train.warmup_steps) == (5, 8, 1e-4, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"num_train_epochs": 0.5}, "epochs is 0.5"),
        ({"batch_size": 4, "per_device_train_batch_size": 4}, "both"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"loss": "cispo"}, "unknown 'loss'"),
        ({"use_peft": False}, "use_peft is False"),
    ],
)
def test_finetune_settings_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        finetune_settings(given)
