"""Scores of one (candidate, policy version) pair on examples that nothing is learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fst_optimizer.config.run import EvalConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.policy.policy import Policy
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.types import Candidate, Item, Rollout

OnRollout = Callable[[Rollout], None]


@dataclass(frozen=True)
class Evaluation:
    """Scores on a split."""

    score: float
    """Mean over the examples; failed rollouts count 0."""
    scores: dict[str, float]
    """Example id -> score."""
    rollouts: int
    failed: int
    """Rollouts whose outcome was not `ok`."""


def evaluate(
    collector: Collector,
    candidate: Candidate,
    items: Sequence[Item],
    *,
    version: int,
    temperature: float = 0.0,
    on_rollout: OnRollout | None = None,
) -> Evaluation:
    """Run the candidate once on every item."""
    rollouts = collector.run_candidate(
        candidate, items, version=version, temperature=temperature, on_rollout=on_rollout
    )
    scores = {rollout.example_id: rollout.score for rollout in rollouts}
    failed = sum(rollout.outcome != "ok" for rollout in rollouts)
    return Evaluation(sum(scores.values()) / len(scores), scores, len(rollouts), failed)


def evaluate_pair(
    collector: Collector,
    candidate: Candidate,
    valset: Sequence[Item],
    config: EvalConfig,
    *,
    version: int,
    on_rollout: OnRollout | None = None,
) -> ValidationScore:
    """The score of a (candidate, policy version) pair on the validation set, and how far the policy has moved."""
    items = valset[: config.max_examples]
    found = evaluate(
        collector, candidate, items, version=version, temperature=config.temperature, on_rollout=on_rollout
    )
    kl, extra = measure_kl(collector, collector.policy, candidate, valset, config, version=version)
    return ValidationScore(version, found.score, kl, found.failed, found.rollouts + extra)


def measure_kl(
    collector: Collector,
    policy: Policy,
    candidate: Candidate,
    items: Sequence[Item],
    config: EvalConfig,
    *,
    version: int,
) -> tuple[float, int]:
    """`kl_to_base` on tokens sampled (temperature 1) with this candidate's prompts, and the rollouts that it took.

    Mean per-token KL(pi_train || pi_base) in nats over the full vocabulary, both sides seeing the same prompts.
    Version 0 is the base: 0, and nothing is run.
    """
    if not version:
        return 0.0, 0
    rollouts = collector.run_candidate(candidate, items[: config.kl_examples], version=version, temperature=1.0)
    calls = [call for rollout in rollouts for call in rollout.calls]
    kl = policy.kl_to_base(calls, version)
    if not math.isfinite(kl):
        raise TrainingError(
            f"policy version {version} has a KL of {kl} to its base: its weights are broken; lower train.lr"
        )
    return kl, len(rollouts)
