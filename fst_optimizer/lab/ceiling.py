"""Where a learning curve levels off: the paper's fit, whether the curve bends at all, and how sure its ceiling is.

R - R0 = (A - R0) / (1 + (C_mid / C)^B): the ceiling A, its half-way cost C_mid, the slope B. Source: arXiv 2605.12484,
where C is steps; here it is training rollouts. R0 is the score before any.

A curve that still rises fits such a function as well, with a ceiling that nobody has seen. As C_mid grows the function
becomes the power law k C^B, which has no ceiling: a curve bends where an F test prefers the fit to the power law, and
more than half of the way to its ceiling was measured. Without a bend no ceiling is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fst_optimizer.lab.curves import Curve
from fst_optimizer.stats import CONFIDENCE

SLOPES = (0.05, 20.0)
"""Bounds of the fit's B. A single jump has no slope, and drives it to the upper one."""
FEWEST_POINTS = 5
"""Evaluations after the start: three parameters, and two to tell how well they fit."""
RESAMPLES = 400
BEND_P = 0.05
"""The F test's level."""
NEARLY = 0.97
"""A fit whose ceiling is a score of 1 tells none unless it came so near."""
EXACT = 1e-9
"""A mean square of residuals that is nothing but rounding."""

TOO_FEW = f"fewer than {FEWEST_POINTS} evaluations after the start"
NO_GAIN = "no gain"
NO_FIT = "the fit does not converge"
JUMP = "one jump: no slope can be told"
NO_BEND = "no bend: no ceiling can be told"


def ceiling(curve: Curve) -> dict[str, float] | None:
    """`A`, `C_mid` and `B` of a curve; None where none can be told."""
    found = fitted(curve)
    return None if isinstance(found, str) else found


def fitted(curve: Curve) -> dict[str, float] | str:
    """`A`, `C_mid` and `B` of a curve, or why no ceiling can be told."""
    import numpy as np

    start, rest = curve[0], [point for point in curve if point.rollouts > 0]
    if len(rest) < FEWEST_POINTS:
        return TOO_FEW
    if max(point.score for point in rest) <= start.score:
        return NO_GAIN
    cost, gain = _arrays(curve)
    begin = (gain.max(), np.log(np.median(cost)), 1.0)
    found = _fit(_levels_off, cost, gain, begin, _bounds(start.score))
    if found is None:
        return NO_FIT
    top, log_mid, slope = found
    if slope > 0.99 * SLOPES[1]:
        return JUMP
    reached = _levels_off(cost.max(), *found)
    if top > NEARLY * (1 - start.score) and reached < NEARLY * top:
        return NO_BEND  # the highest score that there is, and not seen
    if slope < 1.01 * SLOPES[0] or np.exp(log_mid) > cost.max() or not _bends(cost, gain, found):
        return NO_BEND
    return {"A": float(start.score + top), "C_mid": float(np.exp(log_mid)), "B": float(slope)}


def with_interval(curve: Curve, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """`A`, `C_mid`, `B`, and the 95% interval of A as `low` and `high`; all None where `why` says why none is told.

    The interval is a bootstrap over residuals: the residuals of the fit, widened by sqrt(n / (n - 3)) for its three
    parameters, are drawn with replacement onto the fitted curve, and each of these curves is fitted again. It is of
    this curve alone: how much seeds and tasks differ is not in it.
    """
    import numpy as np

    found = fitted(curve)
    if isinstance(found, str):
        return {**dict.fromkeys(("A", "C_mid", "B", "low", "high")), "why": found}
    (cost, gain), start = _arrays(curve), curve[0].score
    best = (found["A"] - start, np.log(found["C_mid"]), found["B"])
    level = _levels_off(cost, *best)
    left = (gain - level) - (gain - level).mean()
    left *= np.sqrt(len(cost) / (len(cost) - 3))
    bounds = _bounds(start)
    drawn = np.random.default_rng(seed)
    again = (_fit(_levels_off, cost, level + drawn.choice(left, len(left)), best, bounds) for _ in range(resamples))
    tops = [start + one[0] for one in again if one is not None]
    low, high = np.quantile(tops, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if tops else (None, None)
    return {
        **found,
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "why": None,
    }


def level_at(found: Mapping[str, Any], start: float, rollouts: float) -> float:
    """The fitted score after so many rollouts."""
    gain = (found["A"] - start) / (1 + (found["C_mid"] / rollouts) ** found["B"]) if rollouts else 0.0
    return float(start + gain)


def _arrays(curve: Curve) -> tuple[Any, Any]:
    """Costs and gains of the evaluations after the start."""
    import numpy as np

    rest = [point for point in curve if point.rollouts > 0]
    cost = np.array([point.rollouts for point in rest], dtype=float)
    return cost, np.array([point.score - curve[0].score for point in rest])


def _bounds(start: float) -> tuple[list[float], list[float]]:
    """Of the gain at the ceiling, the log of C_mid, and B: no score is above 1."""
    return [0, 0, SLOPES[0]], [1 - start, 50, SLOPES[1]]


def _levels_off(cost: Any, top: float, log_mid: float, slope: float) -> Any:
    import numpy as np

    return top / (1 + np.exp(slope * (log_mid - np.log(cost))))


def _rises_on(cost: Any, log_scale: float, slope: float) -> Any:
    import numpy as np

    return np.exp(log_scale + slope * np.log(cost))


def _bends(cost: Any, gain: Any, found: tuple[float, ...]) -> bool:
    """Whether the fit is better than a power law's, by an F test on what its third parameter explains."""
    import numpy as np
    from scipy.stats import f

    begin = (np.log(max(gain[-1], 1e-3)) - np.log(cost[-1]), 1.0)
    straight = _fit(_rises_on, cost, gain, begin, ([-np.inf, SLOPES[0]], [np.inf, SLOPES[1]]))
    if straight is None:
        return True
    with_bend, without = (
        float(((gain - model(cost, *values)) ** 2).sum())
        for model, values in ((_levels_off, found), (_rises_on, straight))
    )
    free = len(cost) - len(found)
    if with_bend <= EXACT * len(cost):
        return without > EXACT * len(cost)
    return float(f.sf((without - with_bend) / (with_bend / free), 1, free)) < BEND_P


def _fit(
    model: Callable[..., Any], cost: Any, gain: Any, begin: tuple[float, ...], bounds: Any
) -> tuple[float, ...] | None:
    """Least squares; None where it does not converge."""
    import numpy as np
    from scipy.optimize import curve_fit

    inside = [float(np.clip(value, *pair)) for value, pair in zip(begin, zip(*bounds, strict=True), strict=True)]
    try:
        with np.errstate(over="ignore"):
            values, _ = curve_fit(model, cost, gain, p0=inside, bounds=bounds)
    except (RuntimeError, ValueError):
        return None
    return tuple(float(value) for value in values)
