"""Arguments of `FST` and `compile` that go by the names that `dspy.GEPA` and its siblings have for them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.config.section import Section
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.text import shown

SETTINGS = {"seed": "seed", "num_threads": "rollout.num_threads"}
"""Argument -> the setting that it stands for. DSPy's optimizers take these when they are made, or in `compile`."""


LONGEST_NAME = 255
"""Bytes of a file's or folder's name that file systems take."""


class FSTArguments(Section):
    """Plain values among the arguments of `FST` and `compile`, which document them."""

    auto: str | None = None
    track_stats: bool = True
    resume: bool = False
    allow_changes: bool = False
    progress: bool = True
    task: str | None = None
    student_follows: bool = False


def by_arguments(config: FSTConfig, **arguments: Any) -> FSTConfig:
    """The config with those arguments that are not None.

    Raises:
        UserError: a value does not fit.
    """
    return config.with_values({SETTINGS[name]: value for name, value in arguments.items() if value is not None})


def run_folder(run_dir: str | Path | None, log_dir: str | Path | None) -> Path | None:
    """The run's folder by either of its names.

    Raises:
        UserError: one is no path, or both are given and they are two folders; or the name is empty.
    """
    for name, folder in (("run_dir", run_dir), ("log_dir", log_dir)):
        if folder is not None:
            check_path(name, folder)
    if run_dir is not None and log_dir is not None and Path(run_dir) != Path(log_dir):
        raise UserError(
            f"run_dir is {str(run_dir)!r} and log_dir is {str(log_dir)!r}: both name the run's folder; give one of them"
        )
    folder = log_dir if run_dir is None else run_dir
    if folder is not None and not str(folder).strip():
        raise UserError(f"run_dir is {folder!r}: give a folder of its own, e.g. runs/first, or None for a new one")
    return None if folder is None else Path(folder)


def check_path(name: str, path: object) -> None:
    """Raises UserError for what cannot be a path."""
    text = str(path) if isinstance(path, str | Path) else ""
    if not text or "\0" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(text).parts):
        raise UserError(f"{name} is {shown(path)}: give a path")


def check_callables(name: str, functions: object) -> None:
    """Raises UserError for what is no list of functions."""
    if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
        raise UserError(f"{name} is {shown(functions)}: give a list of functions")


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
