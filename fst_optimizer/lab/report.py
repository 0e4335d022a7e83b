"""`fst lab report`: the results page, made from `compare.json` files alone.

No number on the page is typed. Sentences that judge are chosen by the numbers they are about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fst_optimizer.errors import UserError
from fst_optimizer.lab import tables
from fst_optimizer.lab.figures import DRIFT, SCORES, draw_all
from fst_optimizer.store.files import read_json
from fst_optimizer.text import code_block, code_span, markdown

NOTE = Path(__file__).with_name("how_to_read.md")
"""The section of the page that explains its numbers."""

MOST_ROLLOUTS, MOST_KL, LEAST_GAIN = 1 / 3, 1 / 2, 0.10
"""The aims: FST's share of RL's rollouts and of RL's KL at RL's best, and its lead over GEPA alone."""

MOST_FLAT, ENTROPY_KEPT, SOLVED = 0.5, 0.2, 0.9
"""A method lost its signal when more of its last groups are flat, it kept less of its entropy, and its final score is
lower: at the top all groups are flat as well."""


def find_comparisons(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Every `compare.json` in these folders or one level below, by its folder's name, which headings and figures have.

    Raises:
        UserError: a folder has none, or two have one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        paths = [path for path in (folder / "compare.json", *sorted(folder.glob("*/compare.json"))) if path.exists()]
        if not paths:
            raise UserError(f"{folder} has no compare.json: make one with fst lab compare ... --out {folder}")
        for path in paths:
            name = path.parent.resolve().name
            if name in found:
                raise UserError(f"two folders are called {name!r}: their figures would be the same files; rename one")
            found[name] = read_json(path)
    return found


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page, and the figures beside it."""
    comparisons = find_comparisons(folders)
    commands = [
        line for data in comparisons.values() for line in (data.get("sweep", {}).get("command"), data.get("command"))
    ]
    commands.append(f"fst lab report {' '.join(map(str, folders))} --out {out}")
    verdicts = [f"- **{markdown(name)}**: {line}" for name, data in comparisons.items() for line in verdict_lines(data)]
    parts = [
        "# Results",
        "This page is generated from the runs' JSON, numbers and verdicts alike. To make it again:",
        code_block("\n".join(dict.fromkeys(map(_one_line, filter(None, commands))))),
        "## In short",
        "\n".join(verdicts) or "Nothing here was compared with RL or GEPA alone.",
        NOTE.read_text().strip(),
    ]
    for name, data in comparisons.items():
        draw_all(data, out.parent / "figures", prefix=f"{name}-")
        parts.append(_task_section(name, data))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n")


def _one_line(command: str) -> str:
    return command.replace("\n", "\\n")


def _task_section(name: str, data: Mapping[str, Any]) -> str:
    parts = [
        f"## {markdown(name)}",
        _setup(data),
        tables.markdown_table(*tables.method_table(data)),
        "\n".join(f"- {line}" for line in verdict_lines(data)),
        f"![Score against training rollouts](figures/{quote(name)}-{SCORES})",
        f"![KL to base against score](figures/{quote(name)}-{DRIFT})",
        _against(data),
        _differences(data),
        _signal(data),
        _ceilings(data),
        _instructions(data),
    ]
    return "\n\n".join(part for part in parts if part)


def _setup(data: Mapping[str, Any]) -> str:
    seeds = sorted({run["seed"] for run in data["runs"]})
    rates = {method: config["train"]["lr"] for method, config in data["settings"].items() if method != "gepa"}
    lines = [
        f"Task {code_span(data['task'])}, seeds {', '.join(map(str, seeds))}, at most {data['max_rollouts']} training "
        f"rollouts a run, {data['val_examples']} validation and {data['test_examples'] or 0} test examples.",
        "Learning rates: " + ", ".join(f"{markdown(method)} {rate:g}" for method, rate in rates.items()) + "."
        if rates
        else "",
        f"Instructions are written by {markdown(data['reflection_lm'])}." if data.get("reflection_lm") else "",
        _sweep(data["sweep"]) if data.get("sweep") else "",
    ]
    return "\n\n".join(line for line in lines if line)


def _sweep(sweep: Mapping[str, Any]) -> str:
    """What every rate came to, and a word on picks at the edge of the grid."""
    rates = sorted({entry["lr"] for entries in sweep["means"].values() for entry in entries})
    rows = []
    for method, entries in sweep["means"].items():
        cells = {entry["lr"]: f"{entry['val_score_after']:.3f} ({entry['settled_rollouts']:.0f})" for entry in entries}
        rows.append([method, *(cells.get(rate, "-") for rate in rates), f"{sweep['picked'][method]:g}"])
    edge = [method for method, rate in sweep["picked"].items() if len(rates) > 1 and rate in (rates[0], rates[-1])]
    note = f" At the edge of the grid, so a better one may lie beyond: {markdown(', '.join(edge))}." if edge else ""
    text = (
        f"The rates come from a sweep on seeds {', '.join(map(str, sweep['seeds']))} of "
        f"{', '.join(map(code_span, sweep['tasks']))}, at most {sweep['max_rollouts']} rollouts a run. Below: "
        "mean final validation scores, and in brackets the rollouts to the settled best. Of the rates within one "
        f"standard error of the best score, the one that settles first was picked.{note}"
    )
    return _under(text, ("method", *(f"lr {rate:g}" for rate in rates), "picked"), rows)


def _against(data: Mapping[str, Any]) -> str:
    if not data["against_rl"]:
        return ""
    return "\n\n".join(
        [
            "**What it took to reach RL's best**, at the ends of cycles alone, paired by seed; means are over the "
            "seeds that reached it.",
            tables.markdown_table(*tables.against_table(data["against_rl_at_cycle_ends"])),
            tables.markdown_table(*tables.pair_table(data["against_rl_at_cycle_ends"])),
            "The same, with the evaluations after fast rounds:",
            tables.markdown_table(*tables.against_table(data["against_rl"])),
        ]
    )


def _under(text: str, head: Sequence[str], rows: tables.Rows) -> str:
    """A table below its text; nothing without rows."""
    return f"{text}\n\n{tables.markdown_table(head, rows)}" if rows else ""


def _differences(data: Mapping[str, Any]) -> str:
    rows = [
        [name, tables.format_ci(found["val_score_after"]), tables.format_ci(found["test_score_after"])]
        for name, found in data["differences"].items()
    ]
    text = "**Final scores, one method less another**, paired by seed."
    return _under(text, ("difference", "validation", "test"), rows)


def _signal(data: Mapping[str, Any]) -> str:
    """What was left to learn from, and who ran out of it."""
    dry = [method for method, found in data["methods"].items() if found["signal"] and _lost_signal(found)]
    note = (
        f" **{markdown(', '.join(dry))}** lost the signal: answers that varied at first ended nearly always the same, "
        "short of the right one, and flat groups teach nothing."
        if dry
        else ""
    )
    text = (
        "**What was left to learn from**: entropy of the sampled tokens in nats, and the share of groups whose "
        f"rewards were all equal, over each run's first and last steps.{note}"
    )
    return _under(text, *tables.signal_table(data))


def _lost_signal(found: Mapping[str, Any]) -> bool:
    signal = {name: value["mean"] for name, value in found["signal"].items()}
    surer = signal["entropy_end"] < ENTROPY_KEPT * signal["entropy_start"]
    return bool(surer and signal["flat_end"] > MOST_FLAT and found["val_score_after"]["mean"] < SOLVED)


def _ceilings(data: Mapping[str, Any]) -> str:
    rows = [
        [run["method"], str(run["seed"]), f"{fit['A']:.3f}", f"{fit['C_mid']:.0f}", f"{fit['B']:.2f}"]
        for run in data["runs"]
        if (fit := run["ceiling"])
    ]
    if not rows:
        return "The paper's ceiling fit converged to a usable number on none of these curves."
    missing = len(data["runs"]) - len(rows)
    note = f" It gave no usable number on {missing} of {len(data['runs'])} curves." if missing else ""
    text = f"**The paper's fit** R - R0 = (A - R0) / (1 + (C_mid / C)^B), over training rollouts.{note}"
    return _under(text, ("method", "seed", "ceiling A", "half-way rollouts", "slope B"), rows)


def _instructions(data: Mapping[str, Any]) -> str:
    """What the first seed of each method with a fast side ended with."""
    first = {run["method"]: run for run in reversed(data["runs"])}
    rows = [
        [f"{method}, seed {first[method]['seed']}", name, text]
        for method in data["methods"]
        if method != "rl"
        for name, text in first[method]["candidate"].items()
    ]
    return _under("**Instructions that were learned.**", ("run", "predictor", "text"), rows)


# -- verdicts ---------------------------------------------------------------------------------------------------


def verdict_lines(data: Mapping[str, Any]) -> list[str]:
    """The aims, each met or missed by the mean over seeds, with the interval beside it."""
    lines = []
    if ours := data["against_rl_at_cycle_ends"].get("fst"):
        lines.append(_reaching("training rollouts", ours, "ratio", MOST_ROLLOUTS))
        lines.append(_reaching("KL to base", ours, "kl_ratio", MOST_KL))
    split, found = _lead_over_gepa(data["differences"])
    if found:
        met = "met" if found["mean"] >= LEAST_GAIN else "missed"
        lines.append(
            f"aim {met}: FST ends {100 * found['mean']:.1f} points above GEPA alone on {split} "
            f"({tables.format_ci(found)}, n = {found['n']}); the aim is at least {100 * LEAST_GAIN:.0f} points."
        )
    return lines


def _reaching(what: str, found: Mapping[str, Any], name: str, most: float) -> str:
    aim = f"the aim is at most {most:.2f} of RL's"
    if not found["reached"]:
        return f"aim missed: FST reached RL's best on none of {found['of']} seeds; {aim} in {what}."
    share = found[name]
    if share is None:
        return f"not decided: RL never left its start, so there is nothing to compare FST's {what} with; {aim}."
    everywhere = found["reached"] == found["of"]
    met = "met" if share["mean"] <= most and everywhere else "missed"
    seeds = "every seed" if everywhere else f"only {found['reached']} of {found['of']} seeds"
    return (
        f"aim {met}: FST reached RL's best on {seeds}, with {tables.format_ci(share, 2)} of RL's {what} there "
        f"(n = {share['n']}); {aim}."
    )


def _lead_over_gepa(differences: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """FST less GEPA, on the test set where there is one. None without both methods."""
    for split, name in (("test", "test_score_after"), ("validation", "val_score_after")):
        if ours := differences.get("fst - gepa", {}).get(name):
            return split, ours
        if theirs := differences.get("gepa - fst", {}).get(name):
            low, high = (None if theirs[bound] is None else -theirs[bound] for bound in ("high", "low"))
            return split, {**theirs, "mean": -theirs["mean"], "low": low, "high": high}
    return "", None
