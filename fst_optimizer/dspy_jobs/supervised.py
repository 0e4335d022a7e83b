"""Supervised training of a policy: conversations as rows, and the slow step's trainer with the likelihood as loss.

TRL's `SFTTrainer` gives the same loss and gradient (a test compares them) and is not used: without a GPU it puts prompt
tokens through the LM head too, and it pads whole batches. docs/decisions.md has the figures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fst_optimizer.dspy_jobs.data import conversations, end_of_turn, text_call
from fst_optimizer.errors import TrainingError
from fst_optimizer.train.losses import LossParts
from fst_optimizer.train.report import StepReport
from fst_optimizer.train.trainer import Trainer
from fst_optimizer.types import TrainRow

if TYPE_CHECKING:
    from fst_optimizer.dspy_jobs.settings import FinetuneSettings
    from fst_optimizer.policy.policy import Policy


def supervised_rows(policy: Policy, train_data: object) -> list[TrainRow]:
    """Conversations as rows of advantage 1. Raises UserError for other data, and for rows longer than the context."""
    end_id = end_of_turn(policy)
    rows = []
    for place, (prompt, answer) in enumerate(conversations(train_data)):
        prompt_ids = policy.encode_chat(prompt)
        call = text_call(policy, prompt_ids, answer, end_id, temperature=1.0, where=f"train_data[{place}]")
        rows.append(TrainRow(call, 1.0, rollout=place, group=place))
    return rows


def batches(count: int, settings: FinetuneSettings) -> Iterator[list[int]]:
    """Indices of each update's rows: every epoch in an order of its own, the last batch as short as it comes."""
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(f"finetune/{settings.seed}/{epoch}").shuffle(order)
        for start in range(0, count, settings.batch_size):
            yield order[start : start + settings.batch_size]


def likelihood(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor) -> LossParts:
    """-A * log pi: with A = 1 the negative log-likelihood. Nothing was sampled, so there is no ratio to correct.

    Shapes: (B, T), (B, T), (B,) -> three of (B, T).
    """
    loss_BT = -advantages_B[:, None] * logprobs_BT
    return loss_BT, torch.ones_like(old_logprobs_BT), torch.zeros_like(old_logprobs_BT, dtype=torch.bool)


def updates(policy: Policy, rows: Sequence[TrainRow], settings: FinetuneSettings) -> Iterator[StepReport]:
    """Train the adapter as it stands, one report an update; its `loss` is the mean negative log-likelihood a token.

    Raises:
        TrainingError: The loss was not finite several times in a row, or always.
    """
    trainer = Trainer(policy.model, policy.pad_id, settings.train, loss=likelihood, lock=policy.lock)
    changed = False
    for batch in batches(len(rows), settings):
        report = trainer.step([rows[index] for index in batch])
        changed = changed or report.updated
        yield report
    if not changed:
        raise TrainingError(f"finetune changed nothing: {report.reason}; lower lr")
