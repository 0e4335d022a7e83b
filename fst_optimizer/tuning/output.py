"""What a study leaves beside its trials: `best.json`, `tune.json`, `report.md` and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.lab.tables import format_ci, markdown_table, number
from fst_optimizer.store.files import write_json
from fst_optimizer.text import plain
from fst_optimizer.tuning.plots import draw_plots, importances
from fst_optimizer.tuning.pruning import unpruned_rollouts
from fst_optimizer.tuning.rows import HEAD, cells, row_json, short_params
from fst_optimizer.tuning.space import suggest, with_values
from fst_optimizer.tuning.study import Plan, settings_json

if TYPE_CHECKING:
    from optuna import Study

BEST, SUMMARY, REPORT, PLOTS = "best.json", "tune.json", "report.md", "plots"


def trial_settings(params: Mapping[str, Any], plan: Plan) -> Settings:
    """The settings that a trial ran with, from its parameters."""
    import optuna

    values = suggest(optuna.trial.FixedTrial(dict(params)), plan.space, plan.settings)
    return with_values(plan.settings, values)


def summarized(study: Study, plan: Plan) -> dict[str, Any]:
    """The study in one object; the same study gives the same."""
    rows = [row_json(trial) for trial in study.get_trials(deepcopy=False)]
    pareto = [] if len(plan.objectives) == 1 else sorted(trial.number for trial in study.best_trials)
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
        "pareto": pareto,
        "trials": rows,
    }


def best_trial(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the complete trial with the best score, the earliest of equals. None: nothing is complete."""
    complete = [row for row in rows if row["state"] == "complete"]
    return max(complete, key=lambda row: (row["score"], -row["trial"]))["trial"] if complete else None


def settings_of(summary: Mapping[str, Any], plan: Plan, trial: int) -> Settings:
    """The settings of one of the study's trials."""
    row = next(row for row in summary["trials"] if row["trial"] == trial)
    return trial_settings(row["params"], plan)


def write_best(summary: Mapping[str, Any], plan: Plan, trial: int, path: Path) -> Settings:
    """`best.json`, which `fst compile --config` takes; the settings in it."""
    row = next(row for row in summary["trials"] if row["trial"] == trial)
    settings = settings_of(summary, plan, trial)
    about = {"study": summary["study"], "trial": trial, "score": row["score"], "params": row["params"]}
    write_json(path, {**about, **settings_json(settings)})
    return settings


def write_outputs(study: Study, plan: Plan, summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write everything, and say which files; nothing about a best where no trial is complete."""
    paths = [folder / SUMMARY, folder / REPORT]
    if summary["best"] is not None:
        write_best(summary, plan, summary["best"], folder / BEST)
        paths.insert(0, folder / BEST)
    write_json(folder / SUMMARY, summary)
    paths += draw_plots(study, plan.objectives, folder / PLOTS)
    (folder / REPORT).write_text(report(summary))
    return paths


def report(summary: Mapping[str, Any]) -> str:
    """A page with the trials, what pruning saved, what mattered, and the winner beside the preset."""
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items())
    parts = [
        f"# Study {plain(summary['study'])}",
        f"Task `{plain(summary['task'])}`, objectives {', '.join(summary['objectives'])}, {summary['cap']} training "
        f"rollouts a trial. Trials: {states}; {summary['rollouts']} training rollouts in all.",
        f"```bash\n{summary['command']}\n```" if summary.get("command") else "",
        pruning_text(summary),
        _confirmed(summary),
        _repeated(summary),
        "## Trials\n\n" + markdown_table(HEAD, [cells(row) for row in summary["trials"]]),
        _important(summary),
        _pareto(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pruning_text(summary: Mapping[str, Any]) -> str:
    """What pruning saved, in a sentence; "" where nothing was pruned."""
    saved = summary["pruning"]
    if not saved or not summary["states"].get("pruned"):
        return ""
    return (
        f"Pruning saved {100 * saved['share']:.0f}% of the training rollouts: {saved['spent']} were spent on complete "
        f"and pruned trials, about {saved['unpruned']:.0f} without it."
    )


COMPARISON_HEAD = ("configuration", "test score", "by seed")


def comparison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The winner, the preset, and the difference."""
    rows = []
    for name, values in (("best", "scores"), ("preset", "scores"), ("difference", "values")):
        one = found[name]
        rows.append([name, format_ci(one), ", ".join(f"{value:.3f}" for value in one[values])])
    return rows


def _confirmed(summary: Mapping[str, Any]) -> str:
    found = summary.get("confirmation")
    if not found:
        return ""
    table = markdown_table(COMPARISON_HEAD, comparison_rows(found))
    return (
        f"## The winner beside the preset\n\nTrial {summary['best']} against `{found['name']}` on the test set, which "
        f"no trial saw; means with 95% intervals over seeds {', '.join(map(str, found['seeds']))}.\n\n{table}\n\n"
        f"The best configuration is: {found['verdict']}."
    )


REPEATED_HEAD = ("trial", "parameters", "score in the study", "mean of repeats", "by seed")


def repeated_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The leading configurations with more seeds."""
    by_number = {row["trial"]: row for row in summary["trials"]}
    return [
        [
            str(one["trial"]),
            short_params(by_number[one["trial"]]["params"]),
            number(by_number[one["trial"]]["score"]),
            format_ci(one),
            ", ".join(f"{value:.3f}" for value in one["scores"]),
        ]
        for one in summary.get("repeats", ())
    ]


def _repeated(summary: Mapping[str, Any]) -> str:
    rows = repeated_rows(summary)
    if not rows:
        return ""
    table = markdown_table(REPEATED_HEAD, rows)
    return f"## More seeds for the leading configurations\n\nValidation scores. The best mean wins.\n\n{table}"


def _important(summary: Mapping[str, Any]) -> str:
    rows = [[name, f"{share:.3f}"] for name, share in summary["importance"].items()]
    if not rows:
        return ""
    return "## Importance (fANOVA)\n\n" + markdown_table(("parameter", "share"), rows)


def pareto_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The trials that none is better than in everything."""
    by_number = {row["trial"]: row for row in summary["trials"]}
    return [
        [
            str(number),
            *(f"{value:.4g}" for value in by_number[number]["values"]),
            short_params(by_number[number]["params"]),
        ]
        for number in summary["pareto"]
    ]


def pareto_head(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `pareto_rows`."""
    return ("trial", *summary["objectives"], "parameters")


def _pareto(summary: Mapping[str, Any]) -> str:
    if not summary["pareto"]:
        return ""
    return "## Pareto set\n\n" + markdown_table(pareto_head(summary), pareto_rows(summary))
