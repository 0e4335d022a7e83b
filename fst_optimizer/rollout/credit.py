"""From scores to advantages: rewards, the group's baseline, and credit to every call. Pure functions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.run import FSTConfig, TrainConfig
from fst_optimizer.types import Group, Outcome, Rollout, TrainRow

FLAT_RELATIVE, FLAT_ABSOLUTE = 1e-6, 1e-9
"""Rewards that differ by no more than this, of the larger one or outright, are equal: some roundings of a float32. Over
its spread, such a difference would be an advantage like any other."""


@dataclass(frozen=True)
class Credit:
    """What the slow step gets out of a batch of groups."""

    rows: tuple[TrainRow, ...]
    reward_mean: float
    """Mean reward over all rollouts, flat groups included."""
    groups: int
    flat_groups: int
    """Groups without signal: of equal reward, or without a call that can be learned from."""
    greedy: Mapping[str, int] = field(default_factory=dict)
    """Trained predictor -> its calls that were decoded greedily. They give no rows."""

    @property
    def unlearned(self) -> str:
        """What to say of greedy calls; "" where there are none."""
        return greedy_calls(self.greedy) if self.greedy else ""


def greedy_calls(predictors: Iterable[str]) -> str:
    """What to say where calls of these predictors were decoded greedily."""
    names = ", ".join(sorted(repr(name) if name else "no known predictor" for name in predictors))
    return (
        f"calls at temperature 0 (of {names}) are not trained on, as nothing was sampled in them: take temperature=0 "
        "out of the settings of the predictor or its LM, so that rollout.temperature holds"
    )


def reward(rollout: Rollout, config: RolloutConfig) -> float:
    """The score of a rollout that ended well, or what the settings give its outcome: `parse_error_reward` and so on."""
    earned: float = rollout.score if rollout.outcome is Outcome.OK else getattr(config, f"{rollout.outcome}_reward")
    return earned


def is_flat(rewards: Sequence[float]) -> bool:
    """Whether all are equal, but for rounding."""
    return not rewards or _equal(max(rewards), min(rewards))


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=FLAT_RELATIVE, abs_tol=FLAT_ABSOLUTE)


def scales(config: TrainConfig) -> bool:
    """Whether advantages are divided by their group's standard deviation."""
    return config.loss != "dr_grpo" if config.scale_advantages is None else config.scale_advantages


def trains_flat(config: TrainConfig) -> bool:
    """Whether flat groups are trained on, for what does not come from rewards."""
    return config.kl_coef > 0 or config.entropy_coef > 0 or config.entropy_floor is not None


def own_weight(config: TrainConfig) -> float:
    """How much of a baseline is the mean of the rollout's own prompt; the rest is the group's."""
    return {"group": 0.0, "prompt": 1.0, "mixed": config.baseline_share}[config.baseline]


def baselines(rewards: Sequence[float], prompts: Sequence[str] = (), own: float = 0.0) -> tuple[float, ...]:
    """What each reward is compared with: `own` x its prompt's mean + (1 - own) x the group's. Length G in and out.

    `prompts` has the candidate of each. One that has a single rollout in the group is compared with the group alone: to
    its own mean it would always be equal, and what was paid for would teach nothing.
    """
    mean = math.fsum(rewards) / len(rewards)
    if not own:
        return (mean,) * len(rewards)
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, rewards, strict=True):
        by_prompt[prompt].append(value)
    means = {prompt: math.fsum(some) / len(some) if len(some) > 1 else mean for prompt, some in by_prompt.items()}
    return tuple(own * means[prompt] + (1 - own) * mean for prompt in prompts)


def advantages(
    rewards: Sequence[float], eps: float = 1e-4, *, scale: bool = True, prompts: Sequence[str] = (), own: float = 0.0
) -> tuple[float, ...]:
    """Reward minus its baseline, over the spread that baselines leave in the group, plus eps. Length G in and out.

    The baseline is the group's mean, or with `own` in part that of the rollout's prompt (`baselines`). The spread is
    the root of the mean square of what is left: around the group's mean its standard deviation (divided by G). It is
    the whole group's for all its prompts, so that one under which answers hardly differ weighs as little as they do.
    Where nothing is left there are zeros. Without `scale` nothing is divided.

    Source: arXiv 2605.12484, the advantage over all G rollouts of a problem, across its K prompts; without `scale`,
    arXiv 2503.20783 (Dr. GRPO). With `own` 1 each prompt has the baseline of a group of its own (arXiv 2402.03300).
    """
    if is_flat(rewards):
        return (0.0,) * len(rewards)
    bases = baselines(rewards, prompts, own)
    if own and all(map(_equal, rewards, bases)):
        return (0.0,) * len(rewards)
    left = [value - base for value, base in zip(rewards, bases, strict=True)]
    if not scale:
        return tuple(left)
    spread = math.sqrt(math.fsum(value**2 for value in left) / len(left))
    return tuple(value / (spread + eps) for value in left)


def credit(groups: Sequence[Group], config: FSTConfig) -> Credit:
    """Give every call of every rollout its advantage, once.

    The mean and the standard deviation are over rollouts, not calls: a rollout with many calls counts once. Rollouts
    that the engine failed say nothing about the policy; they are left out of their group. Calls of predictors that are
    not trained give no rows, nor do greedy calls: their tokens were not sampled, so there is no log-prob of choosing
    them. Their rollouts count in the baseline. What is flat gives rows where the settings have a use for them.
    """
    rows: list[TrainRow] = []
    seen: list[float] = []
    greedy: Counter[str] = Counter()
    flat = number = 0
    for group_number, group in enumerate(groups):
        members = [rollout for rollout in group.rollouts if rollout.outcome is not Outcome.ENGINE_ERROR]
        rewards = [reward(rollout, config.rollout) for rollout in members]
        seen.extend(rewards)
        shares = _shares(members, rewards, config.train)
        signal = {name: any(share.values()) for name, share in shares.items()}
        calls = [
            (place, call)
            for place, rollout in enumerate(members)
            for call in rollout.calls
            if call.completion_ids and config.trains(call.predictor)
        ]
        greedy.update(call.predictor for _, call in calls if not call.temperature)
        own = [
            TrainRow(call, shares[call.predictor][place], number + place, group_number, flat=not signal[call.predictor])
            for place, call in calls
            if call.temperature and (signal[call.predictor] or trains_flat(config.train))
        ]
        flat += all(row.flat for row in own)
        number += len(members) if own else 0
        rows.extend(own)
    mean = math.fsum(seen) / len(seen) if seen else 0.0
    return Credit(tuple(rows), mean, len(groups), flat, dict(greedy))


def teaches_nothing(rollouts: Sequence[Rollout], config: FSTConfig) -> bool:
    """Whether the rewards of a group are all equal so far: with credit by predictor, those of every trained one.

    Not yet known with fewer than two rollouts that were answered.
    """
    answered = [rollout for rollout in rollouts if not rollout.lost]
    if len(answered) < 2:
        return False
    rewards = [reward(rollout, config.rollout) for rollout in answered]
    if config.train.credit == "rollout":
        return is_flat(rewards)
    judged = _judged_by(answered, rewards, config.train)
    trained = [list(earned.values()) for name, earned in judged.items() if config.trains(name)]
    return all(map(is_flat, trained or [rewards]))


def _shares(members: Sequence[Rollout], rewards: Sequence[float], config: TrainConfig) -> dict[str, dict[int, float]]:
    """Predictor -> place in the group -> the advantage of that predictor's calls in that rollout."""

    def given(earned: Mapping[int, float]) -> dict[int, float]:
        prompts = [members[place].candidate_id for place in earned]
        values, own = list(earned.values()), own_weight(config)
        found = advantages(values, config.advantage_eps, scale=scales(config), prompts=prompts, own=own)
        return dict(zip(earned, found, strict=True))

    if config.credit == "rollout":
        names = dict.fromkeys(call.predictor for rollout in members for call in rollout.calls)
        return dict.fromkeys(names, given(dict(enumerate(rewards))))
    return {name: given(earned) for name, earned in _judged_by(members, rewards, config).items()}


def _judged_by(
    members: Sequence[Rollout], rewards: Sequence[float], config: TrainConfig
) -> dict[str, dict[int, float]]:
    """Predictor -> place in the group -> what that predictor's calls in that rollout are judged by.

    Each predictor has a baseline of its own, over the rollouts that called it, of own_share x its own score +
    (1 - own_share) x the rollout's reward. A rollout that failed has no own scores: its reward stands for them.
    """
    names = dict.fromkeys(call.predictor for rollout in members for call in rollout.calls)
    return {
        name: {
            place: config.own_share * rollout.predictor_scores.get(name, rewards[place])
            + (1 - config.own_share) * rewards[place]
            for place, rollout in enumerate(members)
            if any(call.predictor == name for call in rollout.calls)
        }
        for name in names
    }
