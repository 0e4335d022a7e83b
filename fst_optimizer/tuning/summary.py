"""What a study leaves beside its trials: `best.json`, `tune.json`, `report.md` and plots."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from fst_optimizer.store.files import write_json
from fst_optimizer.tuning.admission import cause_of, rollouts_of
from fst_optimizer.tuning.plots import draw_plots
from fst_optimizer.tuning.report import report
from fst_optimizer.tuning.storage import quiet_optuna
from fst_optimizer.tuning.study import StudyPlan, settings_json

if TYPE_CHECKING:
    from optuna import Study

logger = logging.getLogger(__name__)
LEAST_COMPLETE = 4
"""Complete trials that fANOVA needs before its forest means anything."""


def finish_study(
    study: Study,
    plan: StudyPlan,
    folder: Path,
    confirm: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Sum the study up, have the winner confirmed, and write all files; the summary.

    `confirm` gives more of the summary, from what is in it: see `confirm.confirm_winner`. None: no repeats.
    """
    summary = {**summarize(study, plan), **more}
    if confirm and summary["best"] is not None:
        summary.update(confirm(summary))
    if summary["best"] is not None:
        row = next(row for row in summary["trials"] if row["trial"] == summary["best"])
        about = {"study": study.study_name, "trial": row["trial"], "score": row["score"], "params": row["params"]}
        write_json(folder / "best.json", {**about, **settings_json(plan.settings_of(row["params"]))})
    write_json(folder / "tune.json", summary)
    draw_plots(study, plan.objectives, folder / "plots", importance=bool(summary["importance"]))
    (folder / "report.md").write_text(report(summary))
    return summary


def summarize(study: Study, plan: StudyPlan) -> dict[str, Any]:
    """The study in one object; the same study gives the same."""
    rows = rows_of(study)
    return {
        "study": study.study_name,
        "task": plan.task,
        "model": plan.model,
        "objectives": list(plan.objectives),
        "cap": plan.cap,
        "space": {name: dict(spec) for name, spec in plan.space.items()},
        "states": {state: sum(row["state"] == state for row in rows) for state in sorted({r["state"] for r in rows})},
        "rollouts": sum(row["rollouts"] for row in rows),
        "pruning": unpruned_rollouts(rows),
        "importance": importances(study, plan.objectives),
        "best": best_trial(rows),
        "pareto": [] if len(plan.objectives) == 1 else sorted(trial.number for trial in study.best_trials),
        "trials": rows,
    }


def rows_of(study: Study) -> list[dict[str, Any]]:
    """The trials as they are kept in `tune.json`."""
    return [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "params": dict(trial.params),
            "values": list(trial.values) if trial.state == TrialState.COMPLETE else None,
            "score": trial.user_attrs.get("best", trial.user_attrs.get("score")),
            "rollouts": rollouts_of(trial),
            "cause": cause_of(trial),
            **{name: trial.user_attrs.get(name) for name in ("origin", "seconds", "pruned", "error", "run")},
            "retry_of": trial.system_attrs.get("failed_trial"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]


def best_trial(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the complete trial with the best score, the earliest of equals. None: nothing is complete."""
    complete = [row for row in rows if row["state"] == "complete"]
    return max(complete, key=lambda row: (row["score"], -row["trial"]))["trial"] if complete else None


def unpruned_rollouts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """What pruning saved: rollouts that the pruned trials would have gone on to spend, and their share of all.

    A pruned trial is taken to have spent otherwise what the complete ones spent on average: all have one cap. None
    while no trial is complete.
    """
    complete = [row["rollouts"] for row in rows if row["state"] == "complete"]
    pruned = [row["rollouts"] for row in rows if row["state"] == "pruned"]
    if not complete:
        return None
    whole = math.fsum(complete) / len(complete)
    spent, unpruned = sum(complete) + sum(pruned), sum(complete) + whole * len(pruned)
    return {"spent": spent, "unpruned": unpruned, "share": 1 - spent / unpruned if unpruned else 0.0}


def importances(study: Study, objectives: Sequence[str]) -> dict[str, float]:
    """Parameter -> its share of the score's variance by fANOVA; empty where there are too few complete trials.

    Parameters that only some trials have are left out, as fANOVA does.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < LEAST_COMPLETE:
        return {}
    place = list(objectives).index("score")
    target = None if len(objectives) == 1 else lambda trial: trial.values[place]
    try:
        with quiet_optuna():
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), target=target)
    except (ValueError, RuntimeError) as error:  # e.g. all scores are equal
        logger.warning("no importances: %s", error)
        return {}
    return {name: float(value) for name, value in found.items()}
