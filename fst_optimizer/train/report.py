"""What one slow step did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Means are over the batch's completion tokens, at the weights before the update of the last epoch.
    """

    updated: bool
    """False: the weights are as they were, and `reason` says why."""
    epochs: int = 0
    """Updates that were made from the batch."""
    loss: float = 0.0
    """CISPO's rises while it learns: read `advantage_delta` and `kl` instead."""
    grad_norm: float = 0.0
    """Before clipping."""
    ratio_mean: float = 1.0
    """Of pi_train / pi_sampler."""
    ratio_max: float = 1.0
    clipped_share: float = 0.0
    """Share of tokens whose ratio was capped or clipped."""
    entropy: float = 0.0
    """Nats per token, at each call's temperature."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in force, what `entropy_floor` adds included."""
    kl: float | None = None
    """Estimated KL to the base, nats per token; None when `kl_coef` is 0."""
    kl_to_last: float | None = None
    """Estimated KL of the weights before the step to those after it, nats per token; None without `target_kl`."""
    advantage_delta: float = 0.0
    """Mean of A * (log pi_train - log pi_sampler), over the tokens that have an advantage."""
    tokens: int = 0
    """Completion tokens trained on."""
    lr: float = 0.0
    """With `target_kl`: what was kept of it."""
    reason: str = ""
