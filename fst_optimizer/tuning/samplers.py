"""What proposes the next trial's settings: Optuna's samplers, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from optuna import samplers

from fst_optimizer.errors import UserError, did_you_mean

SAMPLERS: dict[str, Callable[[int], samplers.BaseSampler]] = {
    # In groups of conditional parameters, and with a constant liar: a running trial counts as bad, so that workers do
    # not try the same.
    "tpe": lambda seed: samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True),
    "random": lambda seed: samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: samplers.QMCSampler(seed=seed),
    "gp": lambda seed: samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: samplers.CmaEsSampler(seed=seed),
    "nsgaii": lambda seed: samplers.NSGAIISampler(seed=seed),
    "nsgaiii": lambda seed: samplers.NSGAIIISampler(seed=seed),
    "brute_force": lambda seed: samplers.BruteForceSampler(seed=seed),
}
"""Name -> from a seed, a sampler."""


def make_sampler(name: str, seed: int, *parts: object) -> samplers.BaseSampler:
    """A sampler by name, from the study's seed.

    `parts` are what else the random numbers follow from: the worker, and how many trials there are. A study that goes
    on would else begin with the very draws of its first trials.

    Raises:
        UserError: an unknown name, or a package that it needs is missing.
    """
    check_sampler(name, 1)
    number = int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big")
    try:
        return SAMPLERS[name](seed if name == "qmc" else number)  # QMC's points must be those of one sequence
    except ImportError as error:
        raise UserError(f"sampler is {name!r}, which needs a package that is not installed: {error}") from error


def check_sampler(name: str, objectives: int) -> None:
    """Refuse an unknown name (with the nearest one), and a sampler that takes one objective only."""
    if name not in SAMPLERS:
        raise UserError(f"sampler is {name!r}: {did_you_mean(name, SAMPLERS)}")
    if objectives > 1 and name == "cmaes":
        raise UserError(f"sampler is {name!r}, which takes one objective: give tpe, or one of the nsga samplers")
