"""Trials as people read them: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fst_optimizer.text import plain
from fst_optimizer.tuning.standing import cause_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SHORT = {
    "train.steps_per_cycle": "T",
    "fast.population": "K",
    "rollout.group_size": "G",
    "lora.rank": "r",
    "lora.alpha / lora.rank": "alpha/r",
    "train.ratio_cap": "cap",
    "train.clip_high": "clip",
    "train.kl_coef": "kl",
    "rollout.temperature": "temp",
    "fast.max_rollouts": "fast",
    "rollout.parse_error_reward": "format",
}
"""Parameter -> what a table calls it; the others go by the last part of their name."""
HEAD = ("trial", "state", "parameters", "score", "rollouts", "")


def row_json(trial: FrozenTrial) -> dict[str, Any]:
    """What is kept of a trial in `tune.json`."""
    attrs = trial.user_attrs
    score = attrs.get("best", attrs.get("score"))
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "origin": attrs.get("origin"),
        "params": dict(trial.params),
        "values": list(trial.values) if trial.state.name == "COMPLETE" else None,
        "score": score,
        "rollouts": int(attrs.get("rollouts", 0)),
        "seconds": attrs.get("seconds"),
        "pruned": attrs.get("pruned"),
        "cause": cause_of(trial) or None,
        "error": attrs.get("error"),
        "run": attrs.get("run"),
        "retry_of": trial.system_attrs.get("failed_trial"),
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    why = row["pruned"] or row["cause"] or ""
    if row["retry_of"] is not None:
        why = f"{why}{', ' if why else ''}again trial {row['retry_of']}"
    if row["origin"]:
        why = f"{why}{', ' if why else ''}{row['origin']}"
    score = "-" if row["score"] is None else f"{row['score']:.3f}"
    return [str(row["trial"]), row["state"], short_params(row["params"]), score, str(row["rollouts"]), plain(why)]


def trial_line(row: Mapping[str, Any]) -> str:
    """What is printed when a trial starts or ends."""
    number, state, params, score, rollouts, why = cells(row)
    if state == "running":
        return f"trial {number} running: {params}"
    return f"trial {number} {state}: score {score}, {rollouts} rollouts{f' ({why})' if why else ''}"


def short_params(params: Mapping[str, Any]) -> str:
    """`T 6, G 8, lr 0.0021`."""
    return ", ".join(f"{short_name(name)} {short_value(value)}" for name, value in params.items())


def short_name(name: str) -> str:
    """A parameter in a table."""
    plain_name = name.split(" of ")[0]
    return SHORT.get(plain_name, plain_name.rpartition(".")[2])


def short_value(value: Any) -> str:
    """Three digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
