"""Arguments of `FST` and `compile` that go by the names that `dspy.GEPA` and its siblings have for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError, did_you_mean

SETTINGS = {"seed": "seed", "num_threads": "rollout.num_threads"}
"""Argument -> the setting that it stands for. DSPy's optimizers take these when they are made, or in `compile`."""


def by_arguments(config: FSTConfig, **arguments: Any) -> FSTConfig:
    """The config with those arguments that are not None.

    Raises:
        UserError: a value does not fit.
    """
    return config.with_values({SETTINGS[name]: value for name, value in arguments.items() if value is not None})


def run_folder(run_dir: str | Path | None, log_dir: str | Path | None) -> Path | None:
    """The run's folder by either of its names.

    Raises:
        UserError: both are given, and they are two folders.
    """
    if run_dir is not None and log_dir is not None and Path(run_dir) != Path(log_dir):
        raise UserError(
            f"run_dir is {str(run_dir)!r} and log_dir is {str(log_dir)!r}: both name the run's folder; give one of them"
        )
    folder = log_dir if run_dir is None else run_dir
    return None if folder is None else Path(folder)


def check_keywords(given: Iterable[str], of_compile: Iterable[str], of_optimizer: Iterable[str]) -> None:
    """Refuse a keyword that `compile` makes nothing of, so that none is dropped unseen.

    Raises:
        UserError: names it, and what it belongs to or the nearest that there is.
    """
    known = [name for name in of_compile if name != "kwargs"]
    for name in given:
        if name in of_optimizer:
            raise UserError(f"compile was given {name!r}, which is the optimizer's: FST(..., {name}=...)")
        raise UserError(f"compile was given {name!r}, which it does not take; {did_you_mean(name, known)}")
