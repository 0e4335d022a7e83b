"""The closing table of a run, and how tables and text are printed: cells and text are text, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fst_optimizer.store.tally import FirstError, commonest_failure
from fst_optimizer.text import clock, plain

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

MOST_CHARACTERS = 200
"""Of an error, in the closing table."""


def number(value: float | None, digits: int = 3) -> str:
    """A number, or `-`."""
    return "-" if value is None else f"{value:.{digits}f}"


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For the terminal; cells are text, whatever markup or control characters a model wrote into them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(plain(title)) if title else None, title_justify="left")
    for name in head:
        table.add_column(Text(plain(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def say(console: Console, text: str) -> None:
    """Print text as it is, control characters spelled out: a path that is broken over lines cannot be copied."""
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def show(console: Console, parts: Iterable[Table | str]) -> None:
    """Print tables and text."""
    for part in parts:
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)


def closing(result: Mapping[str, Any], next_steps: str) -> list[Table | str]:
    """What a finished run came to; last, where it is and what to do with it."""
    texts = [[name, text] for name, text in result["candidate"].items()]
    instructions = rich_table("", ("predictor", "learned instruction"), texts)
    title = f"{result['method']} on {result['task']}, seed {result['seed']}"
    return [title, _scores(result), _costs(result), instructions, next_steps]


def files_left(run_dir: Path) -> str:
    """Where a run's files are."""
    return f"files     {run_dir}/ (result.json, metrics.jsonl, program.json, policy/)"


def from_python(run_dir: Path, program: type, model: str | None = None) -> str:
    """What a script can do with a finished run of this class of program, and of a `model` that must be said."""
    new = "..." if program.__module__.startswith("dspy") else f"{program.__name__}()"
    at = "" if model is None else f", model={model!r}"
    return f"{files_left(run_dir)}\nuse it    program = fst_optimizer.load({str(run_dir)!r}, program={new}{at})"


def _scores(result: Mapping[str, Any]) -> Table:
    rows = []
    for split, label in (("val", "validation"), ("test", "test")):
        before, after = result[f"{split}_score_before"], result[f"{split}_score_after"]
        if split == "test" and before is None and after is None:
            continue
        gain = f"{after - before:+.3f}" if before is not None and after is not None else "-"
        rows.append([label, number(before, 4), number(after, 4), gain])
    return rich_table("", ("", "before", "after", "gain"), rows)


def _costs(result: Mapping[str, Any]) -> str:
    counts = result["rollouts"]
    rollouts = "  ".join(f"{name} {counts[name]}" for name in ("fast", "slow", "eval", "reused"))
    cost = result["cost_usd"]
    money = "unknown price" if cost is None else f"${cost:.4f}"
    return (
        f"rollouts  {rollouts}\n{_search(result)}{_failures(result)}"
        f"cycles {result['cycles']}  steps {result['steps']}  reflection calls {result['reflection_calls']} ({money})  "
        f"time {clock(result['wall_s'])}  ended: {result['ended']}\n"
        f"best pair at policy version {result['policy_version']}, KL to base {result['kl_to_base']:.4f} nats a token"
    )


def _search(result: Mapping[str, Any]) -> str:
    """A line on a search for prompts that ended before its rollouts did, and what that left; "" where none did."""
    why, unused = result.get("search_over"), result.get("unused_rollouts")
    if not why:
        return ""
    left = f"; {unused} rollouts of the cap not used" if unused else ""
    return f"prompts   {why}{left}\n"


def _failures(result: Mapping[str, Any]) -> str:
    """A line on the commonest outcome besides `ok`; "" without any, and for a run of an older version."""
    outcomes, first = result.get("outcomes", {}), result.get("first_error")
    found = commonest_failure(outcomes)
    if not found or not first:
        return ""
    outcome, count = found
    whole = sum(outcomes.values())
    text = str(FirstError(**first))
    return f"failed    {outcome} {count} of {whole} ({count / whole:.0%}); the first: {text[:MOST_CHARACTERS]}\n"
