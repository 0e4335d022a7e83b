"""The grid of total rollouts on which trials are compared, as pure functions.

Trials with different T and G are evaluated after different numbers of rollouts. At a point of the grid, a trial counts
with its last validation score at or before it, so that all are compared at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from fst_optimizer.config.run import FSTConfig

POINTS = 9
"""Points of a grid: Hyperband's rungs are at a ninth of the cap and at a third."""


def grid_points(cap: int, count: int = POINTS) -> tuple[int, ...]:
    """`count` evenly spaced numbers of rollouts that end at the cap: 900 in 3 points gives 300, 600, 900."""
    return tuple(cap * number // count for number in range(1, count + 1))


def passed(points: Sequence[int], rollouts: int) -> int:
    """How many points lie below this many rollouts: those for which no later evaluation can count any more."""
    return sum(point < rollouts for point in points)


def planned_rollouts(config: FSTConfig) -> int:
    """Most training rollouts, fast and slow, that a run with these settings spends: what `budget.max_rollouts` caps."""
    if config.budget.max_rollouts is not None:
        return config.budget.max_rollouts
    fast = config.fast.max_rollouts if config.method != "rl" else 0
    slow = config.train.steps_per_cycle * config.rollout.batch_size * config.rollout.group_size
    return config.budget.max_cycles * (fast + (slow if config.method != "gepa" else 0))
