"""From scores to advantages: rewards, the group's baseline, and credit to every call. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fst_optimizer.config import RolloutConfig
from fst_optimizer.types import Group, Outcome, Rollout, TrainRow


@dataclass(frozen=True)
class Credit:
    """What the slow step gets out of a batch of groups."""

    rows: tuple[TrainRow, ...]
    reward_mean: float
    """Mean reward over all rollouts, flat groups included."""
    groups: int
    flat_groups: int
    """Groups of equal reward: they carry no signal and give no rows."""


def reward(rollout: Rollout, config: RolloutConfig) -> float:
    """The score of a rollout that ended well, or its outcome's configured reward."""
    if rollout.outcome is Outcome.OK:
        return rollout.score
    return {
        Outcome.PARSE_ERROR: config.parse_error_reward,
        Outcome.TRUNCATED: config.truncated_reward,
        Outcome.PROMPT_TOO_LONG: config.prompt_too_long_reward,
        Outcome.PROGRAM_ERROR: config.program_error_reward,
        Outcome.TIMEOUT: config.timeout_reward,
    }[rollout.outcome]


def advantages(rewards: Sequence[float], eps: float = 1e-4) -> tuple[float, ...]:
    """Reward minus the group's mean, over its standard deviation plus eps. Length G in, length G out.

    The deviation is the population's (divided by G). Equal rewards give zeros.

    Source: arXiv 2605.12484, the advantage over all G rollouts of a problem, across its K prompts.
    """
    if not rewards or max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in rewards) / len(rewards))
    return tuple((value - mean) / (spread + eps) for value in rewards)


def credit(groups: Sequence[Group], config: RolloutConfig, eps: float = 1e-4) -> Credit:
    """Give every call of every rollout its rollout's advantage.

    The mean and the spread are over rollouts, not calls: a rollout with many calls counts once. Rollouts that the
    engine failed are nobody's fault; they are left out of their group.
    """
    rows: list[TrainRow] = []
    seen: list[float] = []
    flat = number = 0
    for group in groups:
        members = [rollout for rollout in group.rollouts if rollout.outcome is not Outcome.ENGINE_ERROR]
        rewards = [reward(rollout, config) for rollout in members]
        seen.extend(rewards)
        shares = advantages(rewards, eps)
        if not any(shares):
            flat += 1
            continue
        for rollout, share in zip(members, shares, strict=True):
            rows.extend(TrainRow(call, share, number) for call in rollout.calls if call.completion_ids)
            number += 1
    mean = math.fsum(seen) / len(seen) if seen else 0.0
    return Credit(tuple(rows), mean, len(groups), flat)
