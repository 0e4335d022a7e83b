"""TRL's GRPOTrainer taking the same step on the same rows, as the yardstick of `fst lab bench`.

Its own data side (generation, rewards) is bypassed: `_prepare_inputs` returns our rows, padded as TRL pads them, and
its `training_step` and optimizer do the rest. Importing this module imports TRL, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.types import TrainRow

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy

MICROBATCH = 16
"""Rows in one of TRL's forward passes: the fastest of 8, 16, 32, 64 and 128 on the letters rows."""


class _Trainer(GRPOTrainer):  # type: ignore[misc]
    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


class TRLStep:
    """Callable: one optimizer step of a GRPOTrainer with the CISPO loss on `rows`."""

    def __init__(self, policy: Policy, rows: Sequence[TrainRow], config: TrainConfig, folder: str) -> None:
        """Loads the policy's base a second time, with a LoRA adapter of the same shape."""
        base = AutoModelForCausalLM.from_pretrained(policy.folder, dtype=policy.model.dtype).to(policy.model.device)
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=MICROBATCH,
            gradient_accumulation_steps=max(1, len(rows) // MICROBATCH),
            num_generations=2,
            loss_type="cispo",
            epsilon_high=config.ratio_cap,
            beta=0.0,
            learning_rate=config.lr,
            max_grad_norm=config.max_grad_norm or 0.0,
            use_cpu=policy.model.device.type == "cpu",
            gradient_checkpointing=config.gradient_checkpointing,
            bf16=policy.model.dtype == torch.bfloat16,
            report_to=[],
            disable_tqdm=True,
        )
        self.trainer = _Trainer(
            model=base,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
            processing_class=policy.tokenizer,
            peft_config=LoraConfig(
                r=policy.lora.rank,
                lora_alpha=policy.lora.alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        self.trainer.create_optimizer()
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.current_gradient_accumulation_steps = -(-len(rows) // MICROBATCH)
        self.limit = config.max_grad_norm
        self.batches = [_padded(rows[i : i + MICROBATCH], policy.pad_id) for i in range(0, len(rows), MICROBATCH)]
        tokens = sum(len(row.call.completion_ids) for row in rows)
        for batch in self.batches:
            batch["num_items_in_batch"] = torch.tensor(float(tokens))
            batch.update({name: value.to(policy.model.device) for name, value in batch.items()})

    def __call__(self) -> None:
        """Forward and backward over all microbatches, clip, step."""
        self.model.train()
        for batch in self.batches:
            self.trainer.training_step(self.model, batch, None)
        if self.limit:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def _padded(rows: Sequence[TrainRow], pad_id: int) -> dict[str, Tensor]:
    """TRL's layout: prompts padded on the left, completions on the right, each to the longest of the batch."""
    prompts = [torch.tensor(row.call.prompt_ids) for row in rows]
    completions = [torch.tensor(row.call.completion_ids) for row in rows]
    return {
        "prompt_ids": pad(prompts, padding_value=pad_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(completions, padding_value=pad_id, padding_side="right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in completions], padding_value=0, padding_side="right"),
        "old_per_token_logps": pad([torch.tensor(row.call.logprobs) for row in rows], padding_value=0.0),
        "advantages": torch.tensor([row.advantage for row in rows]),
    }
