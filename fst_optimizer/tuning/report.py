"""A study as a page of Markdown, which `fst tune` also prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fst_optimizer.lab.tables import format_ci, markdown_table
from fst_optimizer.progress.tables import number
from fst_optimizer.text import code_block, code_span, markdown, plain

SHORT = {
    "train.steps_per_cycle": "T",
    "fast.population": "K",
    "rollout.group_size": "G",
    "lora.rank": "r",
    "lora.alpha / lora.rank": "alpha/r",
    "train.ratio_cap": "cap",
    "train.clip_high": "clip",
    "train.kl_coef": "kl",
    "train.entropy_coef": "entropy",
    "rollout.temperature": "temp",
    "fast.max_rollouts": "fast",
    "rollout.parse_error_reward": "format",
}
"""Parameter -> what a table calls it; the others go by the last part of their name."""
HEAD = ("trial", "state", "parameters", "score", "rollouts", "")


def report(summary: Mapping[str, Any]) -> str:
    """A page with the trials, what pruning saved, what mattered, and the winner beside the preset."""
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items())
    parts = [
        f"# Study {markdown(summary['study'])}",
        f"Task {code_span(summary['task'])}, objectives {', '.join(summary['objectives'])}, {summary['cap']} training "
        f"rollouts a trial. Trials: {states}; {summary['rollouts']} training rollouts in all.",
        code_block(summary["command"], "bash") if summary.get("command") else "",
        pruning_text(summary),
        _confirmation(summary),
        _repeats(summary),
        "## Trials\n\n" + markdown_table(HEAD, [cells(row) for row in summary["trials"]]),
        _importance(summary),
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


def _confirmation(summary: Mapping[str, Any]) -> str:
    found = summary.get("confirmation")
    if not found:
        return ""
    values = {"best": "scores", "preset": "scores", "difference": "values"}
    rows = [[side, format_ci(found[side]), _by_seed(found[side][name])] for side, name in values.items()]
    return (
        f"## The winner beside the preset\n\nTrial {summary['best']} against {code_span(found['name'])} on the test "
        f"set, which no trial saw; means with 95% intervals over seeds {', '.join(map(str, found['seeds']))}.\n\n"
        f"{markdown_table(('configuration', 'test score', 'by seed'), rows)}\n\n"
        f"The best configuration is: {found['verdict']}."
    )


def _repeats(summary: Mapping[str, Any]) -> str:
    if not summary.get("repeats"):
        return ""
    trials = {row["trial"]: row for row in summary["trials"]}
    rows = []
    for one in summary["repeats"]:
        trial = trials[one["trial"]]
        scores = [number(trial["score"]), format_ci(one), _by_seed(one["scores"])]
        rows.append([str(one["trial"]), short_params(trial["params"]), *scores])
    table = markdown_table(("trial", "parameters", "score in the study", "mean of repeats", "by seed"), rows)
    return f"## More seeds for the leading configurations\n\nValidation scores. The best mean wins.\n\n{table}"


def _importance(summary: Mapping[str, Any]) -> str:
    rows = [[name, f"{share:.3f}"] for name, share in summary["importance"].items()]
    return "## Importance (fANOVA)\n\n" + markdown_table(("parameter", "share"), rows) if rows else ""


def _pareto(summary: Mapping[str, Any]) -> str:
    rows = [
        [str(row["trial"]), *(f"{value:.4g}" for value in row["values"]), short_params(row["params"])]
        for row in summary["trials"]
        if row["trial"] in summary["pareto"]
    ]
    head = ("trial", *summary["objectives"], "parameters")
    return "## Pareto set\n\n" + markdown_table(head, rows) if rows else ""


def _by_seed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A trial's row of the table."""
    again = f"again trial {row['retry_of']}" if row["retry_of"] is not None else ""
    why = ", ".join(text for text in (row["pruned"] or row["cause"], again, row["origin"]) if text)
    score, rollouts = number(row["score"]), str(row["rollouts"])
    return [str(row["trial"]), row["state"], short_params(row["params"]), score, rollouts, plain(why)]


def trial_line(row: Mapping[str, Any]) -> str:
    """What is printed when a trial starts or ends."""
    trial, state, params, score, rollouts, why = cells(row)
    if state == "running":
        return f"trial {trial} running: {params}"
    return f"trial {trial} {state}: score {score}, {rollouts} rollouts{f' ({why})' if why else ''}"


def short_params(params: Mapping[str, Any]) -> str:
    """`T 6, G 8, lr 0.0021`."""
    texts = []
    for name, value in params.items():
        setting = name.split(" of ")[0]
        short = SHORT.get(setting, setting.rpartition(".")[2])
        texts.append(f"{short} {value:.3g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(texts)
