"""When a trial is pruned: Optuna's pruners, by name, on a grid of total rollouts.

Trials with different T and G are evaluated after different numbers of rollouts. At a point of the grid, a trial counts
with its last validation score at or before it, so that all are compared at the same cost. For Optuna, the points are
the steps 1, 2, ... of a trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fst_optimizer.errors import UserError, did_you_mean

POINTS = 9
"""Points of a grid: Hyperband's rungs are at a ninth of the cap and at a third."""
SCORES = "scores"
"""The user attribute with a trial's validation scores by example, at each point of the grid that it passed."""
P_VALUE = 0.05
"""One-sided: how unlikely scores as low as these are, were the trial as good as the best one. Up to nine points are
compared, so it is a small one."""
MEDIAN_WAITS_FOR = 4
"""Trials that must have ended before the median prunes."""


def grid_points(cap: int, count: int = POINTS) -> tuple[int, ...]:
    """`count` evenly spaced numbers of rollouts that end at the cap: 900 in 3 points gives 300, 600, 900."""
    return tuple(cap * number // count for number in range(1, count + 1))


def passed(points: Sequence[int], rollouts: int) -> int:
    """How many points lie below this many rollouts: those for which no later evaluation can count any more."""
    return sum(point < rollouts for point in points)


class SmallHyperband(BasePruner):
    """Hyperband for studies of some dozens of trials: two brackets, which hide no trials from the sampler.

    On nine points the one bracket keeps about a third of its trials at a ninth of the cap and again at a third, the
    other at a third alone. Left out is Hyperband's last bracket, in which nothing is ever pruned: one trial in six.
    And where Optuna sees `HyperbandPruner` itself, it shows a sampler only the trials of the same bracket, so that no
    bracket of a small study would leave the sampler's random start.
    """

    def __init__(self, points: int) -> None:
        self.pruner = HyperbandPruner(min_resource=1, max_resource=max(1, points - 1), reduction_factor=3)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """See `optuna.pruners.BasePruner.prune`."""
        return self.pruner.prune(study, trial)


class WilcoxonOnGrid(BasePruner):
    """Prunes a trial whose examples' scores are clearly below the best trial's at the same point of the grid.

    Wilcoxon's signed-rank test over the validation examples, paired. Optuna's own `WilcoxonPruner` takes one value an
    example over a trial's whole life; here every example is scored again as the trial learns.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """See `optuna.pruners.BasePruner.prune`."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.last_step is None or not done:
            return False
        best = max(done, key=lambda other: other.value if other.value is not None else -math.inf)
        point = str(trial.last_step)
        ours, theirs = trial.user_attrs.get(SCORES, {}).get(point), best.user_attrs.get(SCORES, {}).get(point)
        return bool(ours and theirs and clearly_below(ours, theirs))


def clearly_below(ours: Mapping[str, float], theirs: Mapping[str, float], p_value: float = P_VALUE) -> bool:
    """Whether these scores by example are below those, by a one-sided signed-rank test. Equal pairs count half."""
    shared = sorted(ours.keys() & theirs.keys())
    differences = [ours[name] - theirs[name] for name in shared]
    if len(differences) < 2 or math.fsum(differences) >= 0:
        return False
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue) < p_value


PRUNERS: dict[str, Callable[[int], BasePruner]] = {
    "hyperband": SmallHyperband,
    "median": lambda points: MedianPruner(n_startup_trials=MEDIAN_WAITS_FOR),
    "wilcoxon": lambda points: WilcoxonOnGrid(),
    "none": lambda points: NopPruner(),
}
"""Name -> from the number of points in the grid, a pruner."""


def make_pruner(name: str, points: int, objectives: Sequence[str]) -> BasePruner:
    """A pruner by name; with several objectives nothing is pruned, whatever the name."""
    return PRUNERS[name](points) if len(objectives) == 1 else NopPruner()


def check_pruner(name: str) -> None:
    """Refuse an unknown name, with the nearest one."""
    if name not in PRUNERS:
        raise UserError(f"pruner is {name!r}: {did_you_mean(name, PRUNERS)}")
