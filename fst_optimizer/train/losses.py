"""Policy-gradient losses, one pure function each, behind `LOSSES`.

Every loss takes `(logprobs_BT, old_logprobs_BT, advantages_B)` and keyword settings named as in `TrainConfig`, and
returns `(loss_BT, ratio_BT, clipped_BT)`, one number per token. What is summed, and with which weights, is
`batch.py`'s matter, so that a loss never needs to know how a batch was split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LossParts = tuple[Tensor, Tensor, Tensor]
Loss = Callable[..., LossParts]

LOG_RATIO_LIMIT = 20.0
"""exp of this is 5e8, far above any cap: without the limit the ratio could overflow."""


def importance_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor) -> Tensor:
    """pi_train / pi_sampler for each token. Shapes: (B, T), (B, T) -> (B, T).

    Anchored on the sampler's own log-probs: with one optimizer step per batch, the trainer's are those of the
    same weights, and their ratio to themselves would be 1 and correct nothing.
    """
    return torch.exp((logprobs_BT - old_logprobs_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def cispo(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_B: Tensor, *, ratio_cap: float = 4.0) -> LossParts:
    """-sg(min(ratio, cap)) * A * log pi: every token keeps its gradient, only its weight is capped.

    Shapes: (B, T), (B, T), (B,) -> three of (B, T). `ratio_cap` is the absolute tau, not TRL's 1 + epsilon.

    Source: arXiv 2605.12484, the slow step's loss, tau = 4.
    """
    ratio_BT = importance_ratio(logprobs_BT.detach(), old_logprobs_BT)
    loss_BT = -ratio_BT.clamp(max=ratio_cap) * advantages_B[:, None] * logprobs_BT
    return loss_BT, ratio_BT, ratio_BT > ratio_cap


def grpo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossParts:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A): a clipped token has no gradient.

    Shapes: (B, T), (B, T), (B,) -> three of (B, T).

    Source: arXiv 2402.03300 (GRPO), with the two bounds of arXiv 2503.14476 (DAPO).
    """
    ratio_BT = importance_ratio(logprobs_BT, old_logprobs_BT)
    advantages_B1 = advantages_B[:, None]
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -torch.minimum(ratio_BT * advantages_B1, bounded_BT * advantages_B1)
    too_low_BT = (ratio_BT < 1 - clip_low) & (advantages_B1 < 0)
    too_high_BT = (ratio_BT > 1 + clip_high) & (advantages_B1 > 0)
    return loss_BT, ratio_BT.detach(), too_low_BT | too_high_BT


LOSSES: dict[str, Loss] = {"cispo": cispo, "grpo": grpo, "dr_grpo": grpo}
"""dr_grpo (arXiv 2503.20783) has GRPO's token loss: what differs is the constant divisor of `batch.token_weights`, and
that its advantages are not divided by their group's standard deviation (`train.scale_advantages`)."""


def kl_estimate(logprobs_BT: Tensor, base_logprobs_BT: Tensor) -> Tensor:
    """k3 = r - 1 - log r with r = pi_base / pi: never negative, KL(pi || pi_base) in the mean over pi's tokens.

    Shapes: (B, T), (B, T) -> (B, T), in nats. As a loss its gradient, (1 - r) grad log pi, is in the mean that of the
    other direction, KL(pi_base || pi): it is zero at the base as well, and pulls hardest where the base is given up.

    Source: Schulman, "Approximating KL Divergence" (2020); used by arXiv 2402.03300.
    """
    log_ratio_BT = (base_logprobs_BT - logprobs_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def token_entropy(logprobs_NV: Tensor) -> Tensor:
    """Exact entropy over the vocabulary, -sum p log p, in nats. Shape: (N, V) log-probs -> (N,).

    Its gradient is -p (log p + 1) in each log-prob, computed anew on the way back: nothing of the size of the
    vocabulary is kept but the log-probs, which `log_softmax` keeps anyway.
    """
    entropy_N: Tensor = _TokenEntropy.apply(logprobs_NV)  # type: ignore[no-untyped-call]
    return entropy_N


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs_NV: Tensor) -> Tensor:
        ctx.save_for_backward(logprobs_NV)
        return -(logprobs_NV.exp() * logprobs_NV).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        logprobs_NV: Tensor = ctx.saved_tensors[0]
        return (logprobs_NV + 1).mul_(logprobs_NV.exp()).mul_(-gradients[0][:, None])


def sampled_kl(logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) by the tokens that the student sampled: a loss, and the estimate itself. Shapes: all (N,).

    The estimate is log pi - log pi_teacher, whose mean is the KL. Its own gradient has a mean of 0: the loss has that
    of the mean, (log pi - log pi_teacher) times the gradient of log pi.
    """
    kl_N = (logprobs_N - teacher_logprobs_N).detach()
    return kl_N * logprobs_N, kl_N


def full_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Exact KL(p || q) over the vocabulary, in nats. Shapes: (..., V), (..., V) -> (...)."""
    logprobs_p = torch.log_softmax(logits_p.float(), -1)
    logprobs_q = torch.log_softmax(logits_q.float(), -1)
    return (logprobs_p.exp() * (logprobs_p - logprobs_q)).sum(-1)
