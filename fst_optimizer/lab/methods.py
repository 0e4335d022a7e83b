"""The methods that a comparison knows by name: which read feedback, and which labels are built in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_optimizer.config.overrides import assignments
from fst_optimizer.config.policy import ENGINES
from fst_optimizer.config.run import METHODS, FSTConfig
from fst_optimizer.errors import UserError, did_you_mean

DSPY_METHODS = ("dspy-gepa", "dspy-grpo", "dspy-together")
"""DSPy's own optimizers on our policy: see `dspy_methods`."""
SFT = "sft"
"""Supervised tuning on the right answers: see `sft`."""
BASELINES = {**dict.fromkeys(DSPY_METHODS, "fst_optimizer.lab.dspy_methods"), SFT: "fst_optimizer.lab.sft"}
"""Methods that are no method of `fst compile` -> the module that makes their runs."""
KNOWN = (*METHODS, *BASELINES)
BLIND = ("rl", "dspy-grpo", SFT)
"""Methods that read no word of feedback: one run of them serves all kinds."""
LABELS: dict[str, tuple[str, ...]] = {
    "fst+k1": ("fast.population=1",),
    "fst+adaptive": ("allocation=adaptive",),
    "fst+posterior": ("rollout.shares=posterior",),
    "fst+prompt-baseline": ("train.baseline=prompt",),
    "fst+mixed-baseline": ("train.baseline=mixed",),
    "fst+stop": ("rollout.stop_flat=true",),
    "fst+refill": ("rollout.refill=8",),
    "fst+undecided": ("rollout.order=undecided",),
    "fst+sampled": ("fast.temperature=1.0",),
    "fst+reuse": ("rollout.reuse=first_step", "fast.temperature=1.0"),
}
"""METHOD+LABEL that needs no `--set-method` -> its settings."""
STEP_LABELS: dict[str, tuple[str, ...]] = {
    "epochs2": ("train.epochs=2",),
    "target-kl": ("train.target_kl=0.01", "train.lr=4e-3"),
    "kl-to-base": ("train.kl_coef=0.02",),
    "entropy-floor": ("train.entropy_floor=0.1",),
}
"""Label of any method with slow steps -> its settings: one change each of the step. The target is given a rate that it
has something to hold back of."""
SEARCH_LABELS: dict[str, tuple[str, ...]] = {
    "parallel": ("fast.parallel_proposals=4",),
    "paired": ("fast.accept=paired",),
    "merge": ("fast.merge=true",),
}
"""Label of any method with fast rounds -> its settings: one change each of the search."""
SWEEP = "sweep"
"""The label of a method that is a small sweep of another: `rl+sweep`."""


def plain(method: str) -> str:
    """The method without engine and label."""
    return re.split("[@+]", method)[0]


def engine_of(method: str) -> str | None:
    """The engine that METHOD@ENGINE names."""
    return method.partition("+")[0].partition("@")[2] or None


def is_sweep(method: str) -> bool:
    """Whether the method stands for several runs, of which the best is reported."""
    return method.partition("+")[2] == SWEEP


def swept(method: str) -> str:
    """The method that a sweep starts from: `rl` of `rl+sweep`."""
    return method.partition("+")[0]


def built_in(method: str) -> tuple[str, ...]:
    """The settings of a label that needs none by hand."""
    name, label = plain(method), method.partition("+")[2]
    of_step = STEP_LABELS.get(label, ()) if name in METHODS and name != "gepa" else ()
    of_search = SEARCH_LABELS.get(label, ()) if name in METHODS and name != "rl" else ()
    return LABELS.get(f"{name}+{label}", of_step or of_search)


def reads_feedback(method: str, config: Mapping[str, Any]) -> bool:
    """Whether what the feedback says can change what the method learns with these settings."""
    searches = plain(method) != "once" or config["fast"].get("once_rollouts") != 0
    return plain(method) not in BLIND and searches


def sweep_points(config: FSTConfig) -> dict[str, tuple[str, ...]]:
    """The grid of `rl+sweep`: label -> settings; beside it stands the method as it is.

    What is said to keep RL from settling too early: a bonus on entropy, a penalty on leaving the base, groups of twice
    as many rollouts (and half as many examples, so that a step costs the same), and half the learning rate.
    """
    group, batch = config.rollout.group_size, config.rollout.batch_size
    return {
        "entropy": ("train.entropy_coef=0.01",),
        "kl": ("train.kl_coef=0.02",),
        "groups": (f"rollout.group_size={2 * group}", f"rollout.batch_size={max(1, batch // 2)}"),
        "lr": (f"train.lr={config.train.lr / 2!r}",),
    }


def parse_methods(text: str) -> tuple[str, ...]:
    """`fst,rl` as names; `fst@vllm` is on another engine than torch, `rl+own` has settings of its own."""
    names = parts_of(text)
    for name in names:
        before, plus, label = name.partition("+")
        if plus and not re.fullmatch(r"[\w-]+", label):
            raise UserError(f"--methods has {name!r}: give a label of letters, digits and dashes after the +")
        method, at, engine = before.partition("@")
        if method not in KNOWN:
            raise UserError(f"--methods has {name!r}: {did_you_mean(method, KNOWN)}")
        if at and (engine not in ENGINES or method in BASELINES):
            raise UserError(f"--methods has {name!r}: {did_you_mean(engine, ENGINES)}")
        if is_sweep(name) and method != "rl":
            raise UserError(f"--methods has {name!r}: only rl has a sweep, rl+{SWEEP}; give another label")
    return names


def by_method(pairs: Iterable[str], under: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """`rl.train.lr=2e-3` strings as method -> `train.lr=2e-3` strings, behind those that are there already."""
    found = {method: list(sets) for method, sets in (under or {}).items()}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if plain(method) not in KNOWN or not dot:
            raise UserError(f"--set-method is {pair!r}: give METHOD.NAME=VALUE, e.g. rl.train.lr=2e-3")
        assignments([rest])
        found.setdefault(method, []).append(rest)
    return found


def parse_kinds(text: str | None) -> tuple[str, ...]:
    """`told,shown` as kinds of feedback; which there are is the task's to say."""
    kinds = parts_of(text) if text is not None else ()
    if bad := [kind for kind in kinds if not re.fullmatch(r"[\w-]+", kind)]:
        raise UserError(f"--kinds has {bad[0]!r}: give kinds of feedback that the task has, e.g. told,shown,scored")
    return kinds


def files_by_method(pairs: Iterable[str], methods: Sequence[str]) -> dict[str, Path]:
    """`fst+wrong=FILE.json` strings as method -> file.

    Raises:
        UserError: it is not so written, or the method is not among those that are compared.
    """
    found = {}
    for pair in pairs:
        method, equals, path = pair.partition("=")
        if not equals or not path or method not in methods:
            raise UserError(
                f"--instructions is {pair!r}: give METHOD=FILE.json, the method one of {', '.join(methods)}"
            )
        found[method] = Path(path)
    return found


def parts_of(text: str) -> tuple[str, ...]:
    """Values separated by commas, each once."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{text!r} names nothing: give values separated by commas")
    return parts
