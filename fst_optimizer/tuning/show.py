"""What a study came to, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.lab.tables import rich_table
from fst_optimizer.tuning import output
from fst_optimizer.tuning.rows import HEAD, cells

if TYPE_CHECKING:
    from rich.table import Table


def closing(summary: Mapping[str, Any], folder: Path, trials: int) -> list[Table | str]:
    """The trials, what pruning saved, the winner, and what to do with it."""
    parts: list[Table | str] = [
        rich_table(f"study {summary['study']}", HEAD, [cells(row) for row in summary["trials"]])
    ]
    if summary.get("repeats"):
        title = "More seeds for the leading configurations, validation"
        parts.append(rich_table(title, output.REPEATED_HEAD, output.repeated_rows(summary)))
    if summary["pareto"]:
        parts.append(rich_table("Pareto set", output.pareto_head(summary), output.pareto_rows(summary)))
    found = summary.get("confirmation")
    if found:
        title = f"Trial {summary['best']} beside {found['name']}, test set"
        parts.append(rich_table(title, output.COMPARISON_HEAD, output.comparison_rows(found)))
        parts.append(f"the best configuration is: {found['verdict']}")
    parts.append("\n".join(text for text in _texts(summary, folder, trials) if text))
    return parts


def _texts(summary: Mapping[str, Any], folder: Path, trials: int) -> list[str]:
    done = summary["states"].get("complete", 0) + summary["states"].get("pruned", 0)
    texts = [f"finished  {done} of {trials} trials, {summary['rollouts']} training rollouts"]
    if done < trials and not summary["states"].get("running"):
        texts.append("stopped   the budget of rollouts has no room for another trial")
    if summary["states"].get("running"):
        texts.append(f"running   {summary['states']['running']} more, by other workers, or lost with one")
    texts.append(output.pruning_text(summary))
    texts.append(f"files     {folder}/ ({output.REPORT}, {output.SUMMARY}, {output.PLOTS}/, trials/)")
    if summary["best"] is not None:
        texts.append(f"best      trial {summary['best']}: {folder / output.BEST}")
        texts.append(f"use it    fst compile {summary['task']} --config {folder / output.BEST} --run-dir runs/best")
    return texts
