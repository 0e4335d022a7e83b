"""From scores to advantages: rewards, the group's baseline, and credit to every call. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fst_optimizer.config.run import FSTConfig, RolloutConfig, TrainConfig
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
    """The score of a rollout that ended well, or what the settings give its outcome: `parse_error_reward` and so on."""
    earned: float = rollout.score if rollout.outcome is Outcome.OK else getattr(config, f"{rollout.outcome}_reward")
    return earned


def advantages(rewards: Sequence[float], eps: float = 1e-4) -> tuple[float, ...]:
    """Reward minus the group's mean, over its standard deviation plus eps. Length G in, length G out.

    The deviation is the population's (divided by G). Equal rewards give zeros.

    Source: arXiv 2605.12484, the advantage over all G rollouts of a problem, across its K prompts.
    """
    if not rewards or max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in rewards) / len(rewards))
    return tuple((value - mean) / (std + eps) for value in rewards)


def credit(groups: Sequence[Group], config: FSTConfig) -> Credit:
    """Give every call of every rollout its advantage, once.

    The mean and the standard deviation are over rollouts, not calls: a rollout with many calls counts once. Rollouts
    that the engine failed say nothing about the policy; they are left out of their group. Calls of predictors that are
    not trained give no rows.
    """
    rows: list[TrainRow] = []
    seen: list[float] = []
    flat = number = 0
    for group_number, group in enumerate(groups):
        members = [rollout for rollout in group.rollouts if rollout.outcome is not Outcome.ENGINE_ERROR]
        rewards = [reward(rollout, config.rollout) for rollout in members]
        seen.extend(rewards)
        shares = _shares(members, rewards, config.train)
        own = [
            TrainRow(call, shares[call.predictor][place], number + place, group_number)
            for place, rollout in enumerate(members)
            for call in rollout.calls
            if call.completion_ids and config.trains(call.predictor) and any(shares[call.predictor].values())
        ]
        flat += not own
        number += len(members) if own else 0
        rows.extend(own)
    mean = math.fsum(seen) / len(seen) if seen else 0.0
    return Credit(tuple(rows), mean, len(groups), flat)


def _shares(members: Sequence[Rollout], rewards: Sequence[float], config: TrainConfig) -> dict[str, dict[int, float]]:
    """Predictor -> place in the group -> the advantage of that predictor's calls in that rollout.

    With `credit="predictor"`, each predictor has a baseline of its own, over the rollouts that called it, of own_share
    x its own score + (1 - own_share) x the rollout's reward. A rollout that failed has no own scores: its reward stands
    for them.
    """
    names = dict.fromkeys(call.predictor for rollout in members for call in rollout.calls)
    if config.credit == "rollout":
        whole = dict(enumerate(advantages(rewards, config.advantage_eps)))
        return dict.fromkeys(names, whole)
    found = {}
    for name in names:
        earned = {
            place: config.own_share * rollout.predictor_scores.get(name, rewards[place])
            + (1 - config.own_share) * rewards[place]
            for place, rollout in enumerate(members)
            if any(call.predictor == name for call in rollout.calls)
        }
        found[name] = dict(zip(earned, advantages(list(earned.values()), config.advantage_eps), strict=True))
    return found
