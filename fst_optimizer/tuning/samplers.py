"""Who proposes the next trial's settings: Optuna's samplers, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from fst_optimizer.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

NAMES = ("tpe", "random", "qmc", "gp", "cmaes", "nsgaii", "nsgaiii", "brute_force")
SCALAR = ("cmaes",)
"""Samplers that know one objective only."""


def make_sampler(name: str, seed: int, *parts: object) -> BaseSampler:
    """A sampler by name.

    Args:
        name: One of `NAMES`. `tpe` is multivariate, in groups of conditional parameters, with a constant liar: what
            runs at the moment counts as bad, so that workers do not try the same.
        seed: The study's.
        parts: What else the random numbers follow from: the worker, and how many trials there are. A study that goes on
            would else begin with the very draws of its first trials.

    Raises:
        UserError: an unknown name, or a package that it needs is missing.
    """
    from optuna import samplers

    check_sampler(name, 1)
    number = int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big")
    make: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: samplers.TPESampler(seed=number, multivariate=True, group=True, constant_liar=True),
        "random": lambda: samplers.RandomSampler(seed=number),
        "qmc": lambda: samplers.QMCSampler(seed=seed),  # its points must be those of one sequence
        "gp": lambda: samplers.GPSampler(seed=number),
        "cmaes": lambda: samplers.CmaEsSampler(seed=number),
        "nsgaii": lambda: samplers.NSGAIISampler(seed=number),
        "nsgaiii": lambda: samplers.NSGAIIISampler(seed=number),
        "brute_force": lambda: samplers.BruteForceSampler(seed=number),
    }
    try:
        return make[name]()
    except ImportError as error:
        raise UserError(f"sampler is {name!r}, which needs a package that is not installed: {error}") from error


def check_sampler(name: str, objectives: int) -> None:
    """The name is a sampler's, and it can do what is asked.

    Raises:
        UserError: it is not, or it takes one objective only.
    """
    if name not in NAMES:
        raise UserError(f"sampler is {name!r}: {did_you_mean(name, NAMES)}")
    if objectives > 1 and name in SCALAR:
        raise UserError(f"sampler is {name!r}, which takes one objective: give tpe, or one of the nsga samplers")
