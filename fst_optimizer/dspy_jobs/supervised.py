"""Supervised training on the slow step's trainer: another loss, the same AdamW, micro-batches and adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fst_optimizer.train.losses import LossParts
from fst_optimizer.train.trainer import Trainer

if TYPE_CHECKING:
    from fst_optimizer.config.run import TrainConfig
    from fst_optimizer.policy.policy import Policy


def likelihood(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor) -> LossParts:
    """-A * log pi: with A = 1 the negative log-likelihood. Nothing was sampled, so there is no ratio to correct.

    Shapes: (B, T), (B, T), (B,) -> three of (B, T).
    """
    loss_BT = -advantages_B[:, None] * logprobs_BT
    return loss_BT, torch.ones_like(old_logprobs_BT), torch.zeros_like(old_logprobs_BT, dtype=torch.bool)


class SupervisedTrainer(Trainer):
    """The trainer with `likelihood` in place of the configured loss: `StepReport.loss` is the mean NLL a token."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        super().__init__(policy.model, policy.pad_id, config, loss=likelihood, lock=policy.lock)
