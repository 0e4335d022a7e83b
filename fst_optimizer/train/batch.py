"""Rows to padded tensors, split into microbatches whose losses simply add up. Pure.

A token's weight is fixed over the whole batch before the split. So the sum over microbatches of `weight * loss` is
the batch's loss, whatever the split, and gradient accumulation equals one big batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fst_optimizer.errors import TrainingError
from fst_optimizer.types import TrainRow


@dataclass(frozen=True)
class Batch:
    """Some rows, padded on the right to the longest. T counts prompt and completion."""

    input_ids_BT: Tensor
    completion_mask_BT: Tensor
    """True on completion tokens. The log-prob of token t is predicted at position t - 1."""
    old_logprobs_BT: Tensor
    """The sampler's, 0 outside the completion."""
    advantages_B: Tensor
    temperatures_B: Tensor
    """Never 0: greedy calls carry log-probs at temperature 1, so 1 stands here."""
    weights_BT: Tensor
    """A token's share of the policy-gradient loss, 0 outside the completion and in flat groups."""
    penalty_weights_BT: Tensor
    """A token's share of the KL penalty and of the entropy bonus, flat groups included."""

    def to(self, device: torch.device) -> Batch:
        """The same rows on `device`."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def length_of(row: TrainRow) -> int:
    """Tokens of one row, prompt and completion."""
    return len(row.call.prompt_ids) + len(row.call.completion_ids)


def trainable(rows: Sequence[TrainRow], train_truncated: bool = True) -> list[TrainRow]:
    """The rows that have a token to learn from: no empty completions, and no cut ones unless asked for."""
    return [row for row in rows if row.call.completion_ids and (train_truncated or row.call.finish_reason != "length")]


def plan_microbatches(lengths: Sequence[int], max_padded_tokens: int) -> list[list[int]]:
    """Indices of rows by microbatch, longest first; rows times longest row stays within `max_padded_tokens`.

    Longest first shows a lack of memory at once. A single row above the budget gets a microbatch of its own.
    """
    plan: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if plan and (len(plan[-1]) + 1) * width <= max_padded_tokens:
            plan[-1].append(index)
        else:
            plan.append([index])
            width = lengths[index]
    return plan


def token_weights(
    rows: Sequence[TrainRow], average: str = "token", max_completion_tokens: int | None = None
) -> list[float]:
    """What one token of each row weighs in the loss of the whole batch `rows`.

    - `token`: 1 / tokens of the batch;
    - `rollout`: 1 / (tokens of the row's rollout over all its calls * rollouts);
    - `prompt`: 1 / (tokens of the row's group over all its rollouts * groups), as arXiv 2605.12484 averages;
    - `constant` (dr_grpo): 1 / (rollouts * max_completion_tokens), so that a long answer is not diluted;
      None takes the longest completion of the batch.

    The first three sum to 1 over the tokens. What has no row in the batch is not counted.
    """
    if not rows:
        return []
    tokens = [len(row.call.completion_ids) for row in rows]
    if average == "token":
        return [1 / sum(tokens)] * len(rows)
    if average == "rollout":
        return _by_unit([row.rollout for row in rows], tokens)
    if average == "prompt":
        return _by_unit([row.group for row in rows], tokens)
    if average == "constant":
        rollouts = len({row.rollout for row in rows})
        return [1 / (rollouts * (max_completion_tokens or max(tokens)))] * len(rows)
    raise ValueError(f"average is {average!r}: token, rollout, prompt or constant")


def signal_weights(
    rows: Sequence[TrainRow], average: str = "token", max_completion_tokens: int | None = None
) -> list[float]:
    """`token_weights` of the rows with signal among themselves, and 0 for rows of flat groups.

    So the policy-gradient loss is what it would be without the flat rows: counted in its mean, they would make every
    step smaller by their share, and a penalty of whatever weight would slow learning down.
    """
    weights = iter(token_weights([row for row in rows if not row.flat], average, max_completion_tokens))
    return [0.0 if row.flat else next(weights) for row in rows]


def _by_unit(units: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Weights with which every unit counts the same, and in it every token; one unit and one count for each row."""
    totals: Counter[int] = Counter()
    for unit, count in zip(units, tokens, strict=True):
        totals[unit] += count
    return [1 / (totals[unit] * len(totals)) for unit in units]


def make_batch(
    rows: Sequence[TrainRow],
    pad_id: int,
    weights: Sequence[float] | None = None,
    penalty_weights: Sequence[float] | None = None,
) -> Batch:
    """Pads `rows` on the right.

    `weights` are `signal_weights`, `penalty_weights` the `token_weights` of the batch they come from (None: all 1).

    Raises:
        TrainingError: a call has no prompt, or not one log-prob for each completion token.
    """
    for call in (row.call for row in rows):
        if not call.prompt_ids:
            raise TrainingError(f"a call of predictor {call.predictor!r} has an empty prompt, so nothing predicts it")
        if len(call.logprobs) != len(call.completion_ids):
            raise TrainingError(
                f"a call of predictor {call.predictor!r} has {len(call.completion_ids)} completion tokens but "
                f"{len(call.logprobs)} log-probs: the engine must record one for each"
            )
    prompts_B1 = torch.tensor([len(row.call.prompt_ids) for row in rows])[:, None]
    lengths = [length_of(row) for row in rows]
    lengths_B1 = torch.tensor(lengths)[:, None]
    width = max(lengths)
    positions_T = torch.arange(width)
    input_ids_BT = torch.tensor(
        [
            [*row.call.prompt_ids, *row.call.completion_ids, *[pad_id] * (width - length)]
            for row, length in zip(rows, lengths, strict=True)
        ]
    )
    completion_mask_BT = (positions_T >= prompts_B1) & (positions_T < lengths_B1)
    sampled = torch.tensor([logprob for row in rows for logprob in row.call.logprobs], dtype=torch.float32)
    weights_B1, penalty_weights_B1 = (
        torch.tensor([1.0] * len(rows) if given is None else given, dtype=torch.float32)[:, None]
        for given in (weights, penalty_weights)
    )
    return Batch(
        input_ids_BT=input_ids_BT,
        completion_mask_BT=completion_mask_BT,
        old_logprobs_BT=torch.zeros(input_ids_BT.shape).masked_scatter(completion_mask_BT, sampled),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        temperatures_B=torch.tensor([row.call.temperature or 1.0 for row in rows], dtype=torch.float32),
        weights_BT=completion_mask_BT * weights_B1,
        penalty_weights_BT=completion_mask_BT * penalty_weights_B1,
    )
