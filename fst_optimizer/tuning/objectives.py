"""What a study may optimize, each read from a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fst_optimizer.errors import FSTError, UserError, did_you_mean

DIRECTIONS = {
    "score": "maximize",
    "rollouts": "minimize",
    "dollars": "minimize",
    "seconds": "minimize",
    "kl_to_base": "minimize",
}
"""Objective -> its direction. `score`: of the best pair on the validation set. `rollouts` and `seconds`: training
rollouts and time until that pair was seen, since what came after bought nothing. `dollars`: of the whole run.
`kl_to_base`: the best pair's, in nats a token."""


def parse_objectives(names: str | Sequence[str]) -> tuple[str, ...]:
    """`score,rollouts` as names; refuses an unknown one, one twice, and a study without score."""
    if not isinstance(names, str | list | tuple):
        raise UserError(f"objectives is {names!r}: give names, {', '.join(DIRECTIONS)}")
    parts = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
    for name in parts:
        if not isinstance(name, str) or name not in DIRECTIONS:
            raise UserError(f"objectives has {name!r}: {did_you_mean(str(name), DIRECTIONS)}")
    if len(set(parts)) < len(parts) or "score" not in parts:
        raise UserError(f"objectives is {','.join(parts)!r}: give score, and others at most once")
    return tuple(parts)


def objective_values(
    names: Sequence[str], result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The objectives of a finished run, from its `result.json` and the lines of its `metrics.jsonl`.

    Raises:
        FSTError: dollars are asked for, and a price is unknown.
    """
    best = next(line for line in lines if line["kind"] == "eval" and line["score"] == result["val_score_after"])
    found = {
        "score": result["val_score_after"],
        "rollouts": best["rollouts"]["fast"] + best["rollouts"]["slow"],
        "dollars": result["cost_usd"],
        "seconds": best["time_s"],
        "kl_to_base": result["kl_to_base"],
    }
    if "dollars" in names and found["dollars"] is None:
        raise FSTError("what the run cost in dollars is unknown: give budget.prices, or leave the objective out")
    return [float(found[name]) for name in names]
