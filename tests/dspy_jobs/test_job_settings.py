import pytest

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.dspy_jobs.settings import (
    BOTH,
    FINETUNE_INSTEAD,
    REINFORCE,
    REINFORCE_INSTEAD,
    FinetuneSettings,
    ReinforceSettings,
)
from fst_optimizer.errors import UserError


def test_without_train_kwargs_a_step_is_our_slow_step():
    assert ReinforceSettings.read(None) == ReinforceSettings(train=TrainConfig())
    assert FinetuneSettings.read(None) == FinetuneSettings(train=TrainConfig(lr=2e-4, warmup_steps=0))


def test_reinforce_settings_are_those_of_the_slow_step_and_of_the_job():
    settings = ReinforceSettings.read(
        {"lr": 1e-4, "loss": "grpo", "kl_coef": 0.1, "ratio_cap": 3.0, "average": "rollout", "microbatch_tokens": 64,
         "gradient_checkpointing": True, "epochs": 2, "target_kl": 0.01, "entropy_floor": 0.1,
         "temperature": 0.8, "memory": 9, "num_generations": 8, "output_dir": "there"}
    )  # fmt: skip
    assert settings.train == TrainConfig(
        lr=1e-4, loss="grpo", kl_coef=0.1, ratio_cap=3.0, average="rollout", microbatch_tokens=64,
        gradient_checkpointing=True, epochs=2, target_kl=0.01, entropy_floor=0.1,
    )  # fmt: skip
    assert (settings.temperature, settings.memory, settings.num_generations, settings.output_dir) == (
        0.8, 9, 8, "there",
    )  # fmt: skip


def test_finetune_settings_are_those_of_the_optimizer_and_of_the_job():
    settings = FinetuneSettings.read({"lr": 1e-4, "betas": (0.8, 0.9), "epochs": 5, "batch_size": 8, "seed": 3})
    assert settings.train == TrainConfig(lr=1e-4, betas=(0.8, 0.9), warmup_steps=0)
    assert (settings.epochs, settings.batch_size, settings.seed, settings.output_dir) == (5, 8, 3, None)


@pytest.mark.parametrize(
    ("read", "instead"), [(ReinforceSettings.read, REINFORCE_INSTEAD), (FinetuneSettings.read, FINETUNE_INSTEAD)]
)
def test_every_name_of_trls_is_refused_with_what_to_do_instead(read, instead):
    for name, remedy in instead.items():
        with pytest.raises(UserError, match=f"train_kwargs has '{name}', which is TRL's: {remedy}"):
            read({name: True})


def test_what_is_told_to_give_instead_is_taken():
    reinforce = {*BOTH, *REINFORCE, *ReinforceSettings.model_fields}
    finetune = {*BOTH, *FinetuneSettings.model_fields}
    for instead, known in ((REINFORCE_INSTEAD, reinforce), (FINETUNE_INSTEAD, finetune)):
        assert not instead.keys() & known
        named = {remedy.removeprefix("give ").split(" ")[0] for remedy in instead.values() if remedy[:5] == "give "}
        assert {name.rstrip(",;").removesuffix("=False") for name in named} <= known


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_coeff": 1}, "unknown 'kl_coeff'; did you mean 'kl_coef'"),
        ({"steps_per_cycle": 3}, "unknown 'steps_per_cycle'"),
        ({"train": {}}, "unknown 'train'"),
        ({"batch_size": 3}, "unknown 'batch_size'"),
        ({"num_iterations": 2}, "'num_iterations', which is TRL's: give epochs"),
        ({"learning_rate": 1e-3, "lr": 1e-3}, "'learning_rate', which is TRL's: give lr"),
        ({"lr": -1}, "train.lr is -1"),
        ({"loss": "ppo"}, "train.loss is 'ppo'"),
        ({"max_completion_length": 512}, "set max_tokens on the Policy"),
        ({"num_generations": 1}, "num_generations is 1: .* num_rollouts_per_grpo_step"),
        ({"temperature": -1}, "temperature is -1: give a number of at least 0"),
        ({"memory": 0}, "memory is 0: give a whole number of at least 1"),
    ],
)
def test_reinforce_settings_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        ReinforceSettings.read(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0.5}, "epochs is 0.5: give a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"loss": "cispo"}, "unknown 'loss'"),
    ],
)
def test_finetune_settings_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        FinetuneSettings.read(given)
