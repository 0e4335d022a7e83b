"""dspy's `train_kwargs`, a plain dictionary, as settings. They have our names; TRL's are refused with ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.config.section import Remedy, Section
from fst_optimizer.errors import UserError, did_you_mean

BOTH = (
    "lr", "warmup_steps", "betas", "weight_decay", "max_grad_norm", "average", "max_bad_steps", "microbatch_tokens",
    "gradient_checkpointing",
)  # fmt: skip
"""Fields of `TrainConfig` that both kinds of jobs take."""
REINFORCE = (
    "loss", "ratio_cap", "clip_low", "clip_high", "kl_coef", "entropy_coef", "entropy_floor", "scale_advantages",
    "advantage_eps", "train_truncated", "epochs", "target_kl",
)  # fmt: skip
"""Those that a reinforce job takes besides."""

INSTEAD = {
    "learning_rate": "give lr",
    "adam_beta1": "give betas, both of them",
    "adam_beta2": "give betas, both of them",
    "lora": "leave it out, a policy always trains its LoRA adapter",
    "use_peft": "leave it out, a policy always trains its LoRA adapter",
    "lr_scheduler_type": "leave it out, after warmup_steps the rate is constant",
    "max_prompt_length": "leave it out, prompts are never cut",
    "max_completion_length": "set max_tokens on the Policy or on the predictor",
    "max_length": "leave out rows that are too long, they are never cut",
    "max_seq_length": "leave out rows that are too long, they are never cut",
    "bf16": "leave it out, the dtype is the policy's",
    "fp16": "leave it out, the dtype is the policy's",
    "packing": "give microbatch_tokens",
    "gradient_checkpointing_kwargs": "give gradient_checkpointing alone",
    "report_to": "leave it out, jobs report to no tracker",
}
"""TRL's name -> what to do instead."""
REINFORCE_INSTEAD = INSTEAD | {
    "beta": "give kl_coef",
    "loss_type": "give loss, and average for what it is averaged over",
    "epsilon": "give clip_low and clip_high",
    "epsilon_high": "give ratio_cap for the cispo loss, clip_high for others",
    "mask_truncated_completions": "give train_truncated=False",
    "num_iterations": "give epochs",
    "scale_rewards": "give scale_advantages",
    "per_device_train_batch_size": "give microbatch_tokens; all groups of a step are one update",
    "gradient_accumulation_steps": "give microbatch_tokens; all groups of a step are one update",
    "logging_steps": "read job.report",
    "log_completions": "leave it out, completions are not logged",
    "save_steps": "call job.save_checkpoint",
}
FINETUNE_INSTEAD = INSTEAD | {
    "num_train_epochs": "give epochs",
    "per_device_train_batch_size": "give batch_size, the rows of one update",
    "gradient_accumulation_steps": "give batch_size, the rows of one update",
    "logging_steps": "read job.losses",
    "save_steps": "give output_dir, where the trained adapter is written",
}


class JobSettings(Section):
    """What both kinds of jobs take."""

    of_train: ClassVar[tuple[str, ...]] = BOTH
    """Fields of `TrainConfig` that can be given."""
    instead: ClassVar[Mapping[str, str]] = INSTEAD

    train: TrainConfig = TrainConfig()
    output_dir: str | Path | None = None
    """Where a reinforce job's `save_checkpoint` writes adapters, and a finetune job the trained one. None: nowhere."""

    @classmethod
    def read(cls, train_kwargs: Mapping[str, Any] | None) -> Self:
        """A job's `train_kwargs`.

        Raises:
            UserError: An unknown name (with the nearest one), one of TRL's (with ours), or a value that does not fit.
        """
        given = dict(train_kwargs or {})
        known = (*cls.of_train, *(cls.model_fields.keys() - {"train"}))
        for name in given:
            if name in cls.instead:
                raise UserError(f"train_kwargs has {name!r}, which is TRL's: {cls.instead[name]}")
            if name not in known:
                raise UserError(f"train_kwargs has unknown {name!r}; {did_you_mean(str(name), known)}")
        train = {name: given.pop(name) for name in cls.of_train if name in given}
        return cls(train=cls().train.changed(**train), **given)


class ReinforceSettings(JobSettings, section="train_kwargs"):
    """How a reinforce job (`dspy.teleprompt.grpo.GRPO`) trains."""

    of_train: ClassVar[tuple[str, ...]] = (*BOTH, *REINFORCE)
    instead: ClassVar[Mapping[str, str]] = REINFORCE_INSTEAD

    train: TrainConfig = TrainConfig()
    """Of the slow step. What belongs to FST's cycles or rollouts in it is not used."""
    temperature: float | None = Field(default=None, ge=0)
    """What calls sample at that ask for none, while the job runs. None: the policy's own, or 1 where that is greedy:
    greedy completions are all equal and give no gradient."""
    memory: int = Field(default=20_000, ge=1)
    """Most completions that are kept to be matched with the text that dspy hands over: at least those of one step."""
    num_generations: Annotated[
        int | None,
        Remedy("a group needs two completions for a baseline; give GRPO num_rollouts_per_grpo_step=8 or so"),
    ] = Field(default=None, ge=2)
    """Completions in a group, written here by GRPO; it is checked, not used. None: any number."""


class FinetuneSettings(JobSettings, section="train_kwargs"):
    """How a finetune job (`dspy.BootstrapFinetune`) trains."""

    instead: ClassVar[Mapping[str, str]] = FINETUNE_INSTEAD

    train: TrainConfig = TrainConfig(lr=2e-4, warmup_steps=0)
    """The optimizer's part of it; the loss is the likelihood of the data."""
    epochs: int = Field(default=3, ge=1)
    """Times that every row is seen."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of one update."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the rows."""
