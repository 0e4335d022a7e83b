"""`fst lab report`: the results page, made from `compare.json` files alone.

No number on the page is typed. Sentences that judge are chosen by the numbers they are about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_optimizer.errors import UserError
from fst_optimizer.lab import tables
from fst_optimizer.lab.figures import DRIFT, SCORES, draw_all
from fst_optimizer.store.files import read_json
from fst_optimizer.text import plain

MOST_ROLLOUTS, MOST_KL, LEAST_GAIN = 1 / 3, 1 / 2, 0.10
"""The aims: FST's share of RL's rollouts and of RL's KL at RL's best, and its lead over GEPA alone."""

MOST_FLAT, ENTROPY_KEPT, SOLVED = 0.5, 0.2, 0.9
"""A method lost its signal when more of its last groups are flat, it kept less of its entropy, and its final score is
lower: at the top all groups are flat as well."""


@dataclass(frozen=True)
class Compared:
    """One task's comparison and the folder that it lies in."""

    data: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """The folder's name; it names headings and figures."""
        return self.folder.resolve().name


def find_comparisons(folders: Sequence[Path]) -> list[Compared]:
    """Every `compare.json` in these folders or one level below.

    Raises:
        UserError: a folder has none, or two have one name.
    """
    found = []
    for folder in folders:
        paths = [path for path in (folder / "compare.json", *sorted(folder.glob("*/compare.json"))) if path.exists()]
        if not paths:
            raise UserError(f"{folder} has no compare.json: make one with fst lab compare ... --out {folder}")
        found += [Compared(read_json(path), path.parent) for path in paths]
    twice = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if twice:
        raise UserError(f"two folders are called {twice[0]!r}: their figures would be the same files; rename one")
    return found


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page, and the figures beside it."""
    everything = find_comparisons(folders)
    for one in everything:
        draw_all(one.data, out.parent / "figures", prefix=f"{one.name}-")
    command = f"fst lab report {' '.join(map(str, folders))} --out {out}"
    parts = [_opening(everything, command), _reading_note(), *map(_task_part, everything)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n")


# -- the page's parts -------------------------------------------------------------------------------------------


def _opening(everything: Sequence[Compared], command: str) -> str:
    commands = dict.fromkeys(
        line
        for one in everything
        for line in (one.data.get("sweep", {}).get("command"), one.data.get("command"))
        if line
    )
    verdicts = [f"- **{one.name}**: {line}" for one in everything for line in verdict_lines(one.data)]
    return "\n\n".join(
        [
            "# Results",
            "This page is generated from the runs' JSON, numbers and verdicts alike. To make it again:",
            "```\n" + "\n".join([*commands, command]) + "\n```",
            "## In short",
            "\n".join(verdicts) or "Nothing here was compared with RL or GEPA alone.",
        ]
    )


def _reading_note() -> str:
    return """## How to read this

**What counts.** All methods share every line of code but the parts that they leave out, and have the same cap of
training rollouts: program runs of the fast side (prompt search) and of the slow side (weight updates) together.
Evaluations are not counted, for any method. A task named without a variant is its default one; that of
`programs/letters` is `pipeline`. Scores are means over the examples with greedy decoding. Intervals are 95%
Student-t intervals over seeds: with few seeds they are wide, and with one there is none.

**Names.** A section is named after its folder. `fst@vllm` is fst on the vLLM engine; `rl+own` is rl with settings of
its own, which the command above tells. Methods called `dspy-...` are DSPy's own optimizers on the same policy, from the
same start and with the same cap. They share policy, data and final scoring with the others, do not look at the
validation set on the way, and so have no curve. dspy-gepa has the same extractive reflector.

**RL's best** is its first validation score within one standard error of its maximum, the standard error taken as
sqrt(s(1-s)/n) over the n validation examples. "Reached" is the first evaluation of the other method, on the same seed,
with at least that score; a method can only be seen to reach it when it is evaluated. RL is evaluated after each cycle,
methods with a fast side also after a fast round that changed the leading prompt. The verdicts count evaluations at the
ends of cycles alone, for all methods; the second table counts all of them, which favours methods with a fast side.

**Validation chooses, test reports.** The best (prompt, weights) pair of a run is chosen on the validation set, so its
validation score flatters it a little. The test set chooses nothing.

**What the feedback gives away.** Methods with a fast side (fst, gepa, sequential) read the metric's feedback on failed
rollouts; RL sees one number a rollout and no word of it. On the letters tasks the feedback on a wrong answer states the
predictor's hidden rule as a sentence, and without a reflection LM the built-in extractive reflector copies sentences
that recur in feedback into the instruction. The prompt side is in effect told the rule and has to find out which
sentence helps; RL has to discover the same rule from scores. A lead of the fast side here shows what such feedback is
worth when a task has it. It does not show that prompts beat weights where feedback says only "wrong"."""


def _task_part(one: Compared) -> str:
    data = one.data
    parts = [
        f"## {one.name}",
        _setup(data),
        tables.markdown_table(tables.METHOD_HEAD, tables.method_rows(data)),
        "\n".join(f"- {line}" for line in verdict_lines(data)),
        f"![Score against training rollouts](figures/{one.name}-{SCORES})",
        f"![KL to base against score](figures/{one.name}-{DRIFT})",
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
        f"Task `{data['task']}`, seeds {', '.join(map(str, seeds))}, at most {data['max_rollouts']} training rollouts "
        f"a run, {data['val_examples']} validation and {data['test_examples'] or 0} test examples.",
        "Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()) + "." if rates else "",
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
    note = f" At the edge of the grid, so a better one may lie beyond: {', '.join(edge)}." if edge else ""
    head = ("method", *(f"lr {rate:g}" for rate in rates), "picked")
    return (
        f"The rates come from a sweep on seeds {', '.join(map(str, sweep['seeds']))} of "
        f"{', '.join(f'`{task}`' for task in sweep['tasks'])}, at most {sweep['max_rollouts']} rollouts a run. Below: "
        "mean final validation scores, and in brackets the rollouts to the settled best. Of the rates within one "
        f"standard error of the best score, the one that settles first was picked.{note}\n\n"
        f"{tables.markdown_table(head, rows)}"
    )


def _against(data: Mapping[str, Any]) -> str:
    if not data["against_rl"]:
        return ""
    return "\n\n".join(
        [
            "**What it took to reach RL's best**, at the ends of cycles alone, paired by seed; means are over the "
            "seeds that reached it.",
            tables.markdown_table(tables.AGAINST_HEAD, tables.against_rows(data["against_rl_at_cycle_ends"])),
            tables.markdown_table(tables.PAIR_HEAD, tables.pair_rows(data["against_rl_at_cycle_ends"])),
            "The same, with the evaluations after fast rounds:",
            tables.markdown_table(tables.AGAINST_HEAD, tables.against_rows(data["against_rl"])),
        ]
    )


def _differences(data: Mapping[str, Any]) -> str:
    rows = [
        [name, tables.format_ci(found["val_score_after"]), tables.format_ci(found["test_score_after"])]
        for name, found in data["differences"].items()
    ]
    if not rows:
        return ""
    table = tables.markdown_table(("difference", "validation", "test"), rows)
    return f"**Final scores, one method less another**, paired by seed.\n\n{table}"


def _signal(data: Mapping[str, Any]) -> str:
    """What was left to learn from, and who ran out of it."""
    rows = tables.signal_rows(data)
    if not rows:
        return ""
    dry = [method for method, found in data["methods"].items() if found["signal"] and _lost_signal(found)]
    note = (
        f" **{', '.join(dry)}** lost the signal: answers that varied at first ended nearly always the same, short of "
        "the right one, and flat groups teach nothing."
        if dry
        else ""
    )
    return (
        f"**What was left to learn from**: entropy of the sampled tokens in nats, and the share of groups whose "
        f"rewards were all equal, over each run's first and last steps.{note}\n\n"
        f"{tables.markdown_table(tables.SIGNAL_HEAD, rows)}"
    )


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
    table = tables.markdown_table(("method", "seed", "ceiling A", "half-way rollouts", "slope B"), rows)
    return f"**The paper's fit** R - R0 = (A - R0) / (1 + (C_mid / C)^B), over training rollouts.{note}\n\n{table}"


def _instructions(data: Mapping[str, Any]) -> str:
    """What the first seed of each method with a fast side ended with."""
    seen: dict[str, Mapping[str, Any]] = {}
    for run in data["runs"]:
        if run["method"] != "rl":
            seen.setdefault(run["method"], run)
    rows = [
        [f"{method}, seed {run['seed']}", name, " ".join(plain(text).split())]
        for method, run in seen.items()
        for name, text in run["candidate"].items()
    ]
    if not rows:
        return ""
    return "**Instructions that were learned.**\n\n" + tables.markdown_table(("run", "predictor", "text"), rows)


# -- verdicts ---------------------------------------------------------------------------------------------------


def verdict_lines(data: Mapping[str, Any]) -> list[str]:
    """The aims, each met or missed by the mean over seeds, with the interval beside it."""
    lines = []
    ours = data["against_rl_at_cycle_ends"].get("fst")
    if ours:
        lines += [
            _reaching("training rollouts", ours, "ratio", MOST_ROLLOUTS),
            _reaching("KL to base", ours, "kl_ratio", MOST_KL),
        ]
    lead = _lead_over_gepa(data)
    if lead:
        split, found = lead
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


def _lead_over_gepa(data: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """FST less GEPA, on the test set where there is one; None without both methods."""
    for name, sign in (("fst - gepa", 1), ("gepa - fst", -1)):
        found = data["differences"].get(name)
        if found is None:
            continue
        for split in ("test", "val"):
            if gap := found[f"{split}_score_after"]:
                return ("test" if split == "test" else "validation"), _signed(gap, sign)
    return None


def _signed(found: Mapping[str, Any], sign: int) -> Mapping[str, Any]:
    if sign > 0:
        return found
    bounds = [None if found[name] is None else -found[name] for name in ("high", "low")]
    return {"mean": -found["mean"], "low": bounds[0], "high": bounds[1], "n": found["n"]}
