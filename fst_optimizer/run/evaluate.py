"""Scores of one (candidate, policy version) pair on examples that nothing is learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fst_optimizer.config.run import EvalConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.rollout.collector import Collector, OnRollout
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.store.tally import Tally, tally_of
from fst_optimizer.types import Candidate, Item, Rollout


@dataclass(frozen=True)
class Evaluation:
    """Scores on a split."""

    score: float
    """Mean over the examples that were answered; failed rollouts count 0."""
    scores: dict[str, float]
    """Example id -> score, without the examples that were lost."""
    rollouts: int
    failed: int
    """Rollouts whose outcome was not `ok`, of the last on each example."""
    tally: Tally
    """How those ended."""
    lost: int
    """Examples on which the engine failed, and failed again: they say nothing about the pair."""
    tokens_per_answer: float = 0.0
    """Mean tokens that the policy read and wrote for one example, over all of the program's calls."""


def evaluate(
    collector: Collector,
    candidate: Candidate,
    items: Sequence[Item],
    *,
    version: int,
    temperature: float = 0.0,
    on_rollout: OnRollout | None = None,
) -> Evaluation:
    """Run the candidate once on every item; once more where the engine failed it.

    Raises:
        EngineError: it failed on every item.
    """
    how = {"version": version, "temperature": temperature}
    rollouts = collector.run_candidate(candidate, items, on_rollout=on_rollout, **how)
    places = [place for place, rollout in enumerate(rollouts) if rollout.lost]
    if places:
        again = collector.run_candidate(candidate, [items[place] for place in places], all_may_be_lost=True, **how)
        for place, rollout in zip(places, again, strict=True):
            rollouts[place] = rollout
    scores = {rollout.example_id: rollout.score for rollout in rollouts if not rollout.lost}
    return Evaluation(
        score=sum(scores.values()) / len(scores),
        scores=scores,
        rollouts=len(rollouts) + len(places),
        failed=sum(rollout.outcome != "ok" for rollout in rollouts),
        tally=tally_of(rollouts),
        lost=len(rollouts) - len(scores),
        tokens_per_answer=tokens_per_answer([rollout for rollout in rollouts if not rollout.lost]),
    )


def tokens_per_answer(rollouts: Sequence[Rollout]) -> float:
    """Mean tokens of a rollout's prompts and completions, over all its calls of the policy; 0 without rollouts."""
    read_and_written = sum(
        len(call.prompt_ids) + len(call.completion_ids) for rollout in rollouts for call in rollout.calls
    )
    return read_and_written / max(1, len(rollouts))


def evaluate_pair(
    collector: Collector,
    candidate: Candidate,
    valset: Sequence[Item],
    config: EvalConfig,
    *,
    version: int,
    on_rollout: OnRollout | None = None,
    on_sampled: OnRollout | None = None,
) -> ValidationScore:
    """The score of a (candidate, policy version) pair on the validation set, and how far the policy has moved.

    `kl_to_base` is the mean per-token KL(pi_train || pi_base) in nats over the full vocabulary, both sides seeing the
    same prompts, on tokens sampled (temperature 1) with this candidate's prompts; `on_sampled` is told of these
    rollouts. Version 0 is the base: 0, and nothing is run for it.
    """
    found = evaluate(
        collector,
        candidate,
        valset[: config.max_examples],
        version=version,
        temperature=config.temperature,
        on_rollout=on_rollout,
    )
    measured = ValidationScore(
        policy_version=version,
        score=found.score,
        kl_to_base=0.0,
        failed=found.failed,
        rollouts=found.rollouts,
        tally=found.tally,
        scores=found.scores,
        lost=found.lost,
        tokens_per_answer=found.tokens_per_answer,
    )
    if not version:
        return measured
    sampled = collector.run_candidate(
        candidate, valset[: config.kl_examples], version=version, temperature=1.0, on_rollout=on_sampled
    )
    kl = collector.policy.kl_to_base([call for rollout in sampled for call in rollout.calls], version)
    if not math.isfinite(kl):
        raise TrainingError(
            f"policy version {version} has a KL of {kl} to its base: its weights are broken; lower train.lr"
        )
    return replace(measured, kl_to_base=kl, rollouts=found.rollouts + len(sampled))
