"""The most that a run may spend, by its settings and the sizes of its data. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.schedule import NO_CAP


@dataclass(frozen=True)
class RunSizes:
    """What a run's length depends on besides its settings."""

    train: int
    """Examples."""
    val: int
    test: int = 0
    components: int = 1
    """Predictors whose instruction may change."""
    teachers: int = 0
    start_version: int = 0


@dataclass(frozen=True)
class Planned:
    """The most that a run may spend: a search that ends early, and pairs that are known already, take less."""

    cycles: int
    steps: int
    fast: int
    slow: int
    training: int
    """Fast and slow together: less than their sum where `budget.max_rollouts` caps it."""
    eval: int
    reflection_calls: int

    @property
    def rollouts(self) -> int:
        """Program runs of all kinds."""
        return self.training + self.eval


def rollouts_per_step(config: FSTConfig, sizes: RunSizes) -> int:
    """Those of one batch, all of them new and no group given up."""
    return min(config.rollout.batch_size, sizes.train) * _group(config, sizes)


def _group(config: FSTConfig, sizes: RunSizes) -> int:
    return config.rollout.group_size + sizes.teachers * config.rollout.teacher_rollouts


def _rollouts_of_steps(config: FSTConfig, sizes: RunSizes, cycles: int, cap: int) -> tuple[int, int]:
    """Most steps that `cap` rollouts last for, and most rollouts of one."""
    whole, group, rollout = rollouts_per_step(config, sizes), _group(config, sizes), config.rollout
    half, least, most = (group + 1) // 2, whole, whole
    if rollout.stop_flat or rollout.refill:  # a step of flat groups alone takes half of its rollouts
        least = whole // group * half
        most += min(rollout.refill, max(0, sizes.train - rollout.batch_size)) * half
    free = cycles if rollout.reuse != "none" else 0  # the first of each cycle may have all of its rollouts already
    return cap // least + free, most


def planned(config: FSTConfig, sizes: RunSizes, dry_run: int = 0) -> Planned:
    """An upper bound on what a run spends, `dry_run` rollouts before it included; resumes may repeat some."""
    budget, length = config.budget, config.train.steps_per_cycle
    evolves, trains = config.search_rollouts != 0 and sizes.components > 0, config.method != "gepa"
    cycles, cap = budget.max_cycles, NO_CAP if budget.max_rollouts is None else budget.max_rollouts
    most_steps, most_of_step = _rollouts_of_steps(config, sizes, cycles, cap)
    steps = min(cycles * length * trains, most_steps)
    if budget.max_steps is not None:
        steps = min(steps, budget.max_steps)
        if config.method in ("fst", "rl"):  # the others have cycles without steps
            cycles = min(cycles, math.ceil(budget.max_steps / length))
    fast_cap = cap if config.search_rollouts is None else min(cap, config.search_rollouts)
    examples = min(sizes.val, config.eval.max_examples or sizes.val)
    kl_examples = min(sizes.val, config.eval.kl_examples)
    pair = examples + kl_examples * (trains or sizes.start_version > 0)
    pairs = min(config.eval.candidates, config.fast.population if evolves else 1)
    first = examples + kl_examples * (sizes.start_version > 0)
    # The cycle in which a search ends has slow steps too: it validates new prompts and new weights, as `fst` does.
    validations = cycles * pairs * (2 if config.method == "fst" else 1) + pairs * config.searches_first * evolves
    reflections = cycles * config.fast.max_proposals * evolves
    reflections *= sizes.components if config.fast.components == "all" else 1
    if config.fast.reflection_calls is not None:
        reflections = min(reflections, config.fast.reflection_calls)
    fast = min(cycles * config.fast.max_rollouts * evolves, fast_cap)
    slow = steps * most_of_step
    return Planned(
        cycles=cycles,
        steps=steps,
        fast=fast,
        slow=slow,
        training=min(fast + slow, cap),
        eval=dry_run + first + validations * pair + 2 * sizes.test,
        reflection_calls=reflections,
    )
