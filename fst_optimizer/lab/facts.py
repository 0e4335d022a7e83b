"""What a run's files say of where its seconds went, and of what it was told. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fst_optimizer.config.formats import GIVEN
from fst_optimizer.evolve.reflection_lm import EXTRACTIVE, recorded_name
from fst_optimizer.lab.methods import SFT, plain, reads_feedback


def seconds_by_phase(lines: Sequence[Mapping[str, Any]], wall_s: float) -> dict[str, float]:
    """Seconds of fast rounds, slow steps and evaluations, and the `rest`: the test sets, and what stands between.

    A phase writes its line when it ends, so a line has the time since the one before. Of several validations in a row
    each has its own.
    """
    found = {"fast": 0.0, "step": 0.0, "eval": 0.0}
    before = 0.0
    for line in lines:
        if line["kind"] in found:
            found[line["kind"]] += line["time_s"] - before
        before = line["time_s"]
    spent = {"fast": found["fast"], "slow": found["step"], "eval": found["eval"]}
    return {name: round(seconds, 3) for name, seconds in {**spent, "rest": wall_s - sum(spent.values())}.items()}


def told(method: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was told beside scores, by its method and its `config.json`.

    `feedback`: whether it read the metric's words; `reflector`: who wrote its instructions, a model's name or
    `extractive`, None where nobody did; `answers`: whether it saw right ones; `instructions`: whether it was started
    from others than the task's own.
    """
    reads = reads_feedback(method, recorded["config"])
    return {
        "feedback": reads,
        "reflector": (recorded_name(recorded) or EXTRACTIVE) if reads else None,
        "answers": plain(method) == SFT,
        "instructions": bool((recorded.get("program") or {}).get(GIVEN)),
    }
