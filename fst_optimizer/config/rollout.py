"""How rollouts are sampled and shared, which of them a step runs, and what the failed ones earn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fst_optimizer.config.section import Section


class RolloutConfig(Section, section="rollout"):
    """How rollouts are sampled, and what the failed ones earn."""

    group_size: int = Field(default=8, ge=2)
    """G, rollouts per example and step, over all candidates."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per step."""
    shares: Literal["equal", "posterior"] = "equal"
    """How a group's rollouts are shared over the prompts: `equal`, or `posterior`, by how likely each is the best by
    its scores in the last fast round: at least two for every prompt that may be it, none for the others. Try it where
    prompts differ much. `rl`, `gepa`, `sequential` and `once`: without effect."""
    teacher_rollouts: int = Field(default=1, ge=1)
    """Rollouts that each teacher program adds to every group."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of training rollouts, where the program does not ask for another."""
    stop_flat: bool = False
    """Whether the first half of every group is run first, and a group whose rewards are all equal by then is given up.
    Try it where most groups are flat (`flat_groups` in `metrics.jsonl`). `gepa`: without effect."""
    refill: int = Field(default=0, ge=0)
    """Most other examples a step that are drawn in the place of groups that were given up so; above 0, flat groups are
    stopped as with `stop_flat`. A step never spends more than the run has left. `gepa`: without effect."""
    order: Literal["shuffled", "undecided"] = "shuffled"
    """How the steps' examples are drawn: `shuffled`, every epoch anew; `undecided`, half of every batch so and half by
    how much the scores of an example's last groups differ. Try it where many examples are always or never right."""
    reuse: Literal["none", "first_step"] = "none"
    """Whether rollouts of a fast round take places in the groups of the step after it, under the same weights, prompt
    and example. They must be sampled as the step's are: set `fast.temperature` to `temperature`. `rl`, `gepa`: without
    effect."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Wall-clock limit of one rollout, in seconds."""
    num_threads: int = Field(default=64, ge=1)
    """Rollouts in flight."""
    parse_error_reward: float = 0.0
    """Reward of a rollout whose answer could not be parsed."""
    truncated_reward: float = 0.0
    """Reward of a rollout that failed because a completion ran into max_tokens."""
    prompt_too_long_reward: float = 0.0
    """Reward of a rollout whose prompt left no room in the context."""
    program_error_reward: float = 0.0
    """Reward of a rollout in which the program or a tool raised."""
    timeout_reward: float = 0.0
    """Reward of a rollout that was cut off after `timeout_s`."""
