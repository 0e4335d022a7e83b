"""`fst lab report`: the results page, made from kept JSON alone.

No number on the page is typed. Sentences that judge are chosen by the numbers they are about, and where FST loses comes
first. What was not run yet is said, with the command that runs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from fst_optimizer.lab import page_figures, page_tables, sections, told
from fst_optimizer.lab.content import Content, content_of, is_comparison
from fst_optimizer.lab.rows import commands_of, find_kept, keep
from fst_optimizer.lab.tables import HeadAndRows, markdown_table
from fst_optimizer.lab.verdicts import SUBJECT, Cell, Row, Verdict, verdicts_of
from fst_optimizer.text import code_block, code_span, markdown

NOTE = Path(__file__).with_name("how_to_read.md")
"""The section of the page that explains its numbers."""
FIGURES = "figures"
COMPARE = (
    "fst lab compare TASK:RULE ... --kinds told,shown,scored --seeds each --max-rollouts 4000 --val-size 64 "
    "--test-size 256 --methods fst,fst+k1,once,sequential,rl,gepa,sft,dspy-together --out runs/table\n"
    "fst lab report runs/table --keep docs/results --out docs/results.md"
)
"""What the page names where it has no comparison."""


def write_report(folders: Sequence[Path], out: Path, kept_in: Path | None = None) -> list[Path]:
    """Write the page, and its figures beside it; what was written, the page last.

    With `kept_in`, what the folders come to is first written there, small, and the page is made from that.
    """
    written = []
    if kept_in is not None:
        written = keep(find_kept(folders), kept_in)
        folders = [kept_in]
    content = content_of(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, data in figures_of(content).items():
        written.append(out.parent / FIGURES / name)
        page_figures.save(data, written[-1])
    out.write_text(page(content, f"fst lab report {' '.join(map(str, folders))} --out {out}"), encoding="utf-8")
    return [*written, out]


def page(content: Content, command: str) -> str:
    """The page's text; `command` made it."""
    parts = [
        "# Results",
        "Made by a command from the runs' JSON, numbers and verdicts alike.",
        "## In short",
        *_in_short(content),
        content.remarks,
        "## What each method was told",
        *_told(content),
        "## Verdicts",
        *_verdicts(content),
        "## Curves",
        *_curves(content),
        "## Means",
        *_means(content),
        *_further(content),
        *(part for section in sections.SECTIONS for part in _experiment(content, section)),
        *_other_experiments(content),
        NOTE.read_text(encoding="utf-8").strip(),
        "## Make it again",
        *_again(content, command),
        *_appendix(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# -- verdicts ---------------------------------------------------------------------------------------------------------

HEADS = {
    "lost": ("**Where FST loses.**", "By these measures it loses nowhere."),
    "undecided": ("**Undecided.**", "Nothing."),
    "won": ("**Where FST wins.**", "Nowhere."),
}


def _in_short(content: Content) -> Iterator[str]:
    found = [one for cell in content.cells for one in verdicts_of(cell)]
    if not found:
        yield f"Not run yet:\n\n{code_block(COMPARE)}"
        return
    yield (
        f"Differences are FST's test score less the other method's, means over rules with 95% intervals; shares are "
        f"medians over rules of the rollouts to RL's best over RL's, where the aim is {page_tables.aim_text()}. Of "
        f"{len(found)} such verdicts about one in twenty would look decided where nothing differs at all."
    )
    for outcome, (head, nothing) in HEADS.items():
        lines = [
            f"- {markdown(cell.family)}, {code_span(cell.kind)}: {'; '.join(map(verdict_text, own))}."
            for cell in content.cells
            if (own := [one for one in found if one.cell is cell and one.outcome == outcome])
        ]
        yield f"{head} {nothing}" if not lines else f"{head}\n\n" + "\n".join(lines)


def verdict_text(one: Verdict) -> str:
    """A verdict in a few words; how many rules it is of only where some are missing."""
    if one.share and one.found is None:
        return "RL never left its start, so there is no best of its to reach"
    if one.share:
        return f"share of RL's rollouts {page_tables.share_text(one.found)}{_missing(one)}"
    return f"{code_span(one.against)} {page_tables.signed(one.found)}{_missing(one)}"


def _missing(one: Verdict) -> str:
    n, of = one.found["n"] if one.found else 0, len(one.cell.units)
    return "" if n == of else f" ({n} of {of} {one.cell.unit}s)"


def _verdicts(content: Content) -> Iterator[str]:
    if not any(SUBJECT in cell.runs for cell in content.cells):
        yield "Not run yet."
        return
    yield (
        "FST's test score less the other method's: the mean over rules with its 95% interval. Won or lost: the "
        "interval leaves out 0. The last line is the share of RL's rollouts that FST took to RL's best, the median "
        f"over rules; won: the whole interval is {page_tables.aim_text()}."
    )
    for family, cells in content.families.items():
        head, rows = page_tables.verdict_table(cells)
        if rows:
            yield f"### {markdown(family)}: verdicts"
            yield _setup(cells)
            yield markdown_table(head, rows)


def _setup(cells: Sequence[Cell]) -> str:
    """How many rules, seeds, rollouts and examples a family's table has."""
    rows = [row for cell in cells for method in cell.runs for row in cell.rows(method)]
    rules, seeds = {row["rule"] for row in rows}, {row["seed"] for row in rows}
    per_rule = Counter((row["rule"], row["method"], row["kind"]) for row in cells[0].rows(next(iter(cells[0].runs))))
    # Runs that were given other instructions start from another score.
    own = [row for row in rows if not row["given_instructions"]]
    starts = len({(row["rule"], row["start"], row["val_score_before"]) for row in own})
    text = (
        f"{len(rules)} rule{'s' * (len(rules) != 1)}, {max(per_rule.values())} seed"
        f"{'s' * (max(per_rule.values()) != 1)} each ({', '.join(map(str, sorted(seeds)))}), at most "
        f"{cells[0].cap} training rollouts a run, {_range(rows, 'val_examples')} validation and "
        f"{_range(rows, 'test_examples')} test examples."
    )
    if starts == len({row["rule"] for row in own}):
        return f"{text} On each rule all methods start from the same weights and data."
    return f"{text} **Not all methods of a rule started from the same weights and data.**"


def _range(rows: Sequence[Row], name: str) -> str:
    found = sorted({row[name] or 0 for row in rows})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


# -- the rest ---------------------------------------------------------------------------------------------------------


def _told(content: Content) -> Iterator[str]:
    if not content.cells:
        yield "Not run yet."
        return
    kinds = dict.fromkeys(cell.kind for cell in content.cells)
    yield "\n".join(f"- {code_span(kind)}: feedback says {told.KINDS_SAY.get(kind, 'its own')}." for kind in kinds)
    yield (
        "Behind `feedback` stands who reads it and writes instructions; `extractive` copies sentences that recur in "
        "it, without an LM."
    )
    yield markdown_table(*told.told_table(content.cells))
    if texts := told.seed_instructions(content.cells):
        yield f"Programs start from: {', '.join(map(code_span, texts))}."
    settings = [
        row
        for data in content.kept.values()
        if is_comparison(data)
        for row in told.own_settings_of(
            data.get("settings", {}), list(dict.fromkeys(row["method"] for row in data["rows"]))
        )
    ]
    if settings:
        yield "Settings in which methods differ; all others are the same:"
        yield markdown_table(("family", "method", "settings"), settings)


def figures_of(content: Content) -> dict[str, page_figures.Panels]:
    """File name -> data of every figure on the page."""
    found = {
        page_figures.file_name(family, rule): page_figures.rule_data(cells, rule)
        for family, cells in content.families.items()
        for rule in _rules(cells)
    }
    for name, data in content.experiments.items():
        if data["rows"]:
            found[page_figures.file_name(name)] = page_figures.experiment_data(data["rows"], _section(name))
    return found


def _rules(cells: Sequence[Cell]) -> list[str]:
    return sorted({row["rule"] for cell in cells for method in cell.runs for row in cell.rows(method)})


def _curves(content: Content) -> Iterator[str]:
    if not content.cells:
        yield "Not run yet."
        return
    yield (
        "A figure a rule, a panel a kind of feedback, a line a run: validation scores at the ends of cycles. Methods "
        "that are evaluated at their ends alone are crosses."
    )
    for family, cells in content.families.items():
        for rule in _rules(cells):
            yield _figure(f"{family}, {rule}: score against rollouts", page_figures.file_name(family, rule))


def _figure(text: str, name: str) -> str:
    return f"![{markdown(text)}]({FIGURES}/{quote(name)})"


def _means(content: Content) -> Iterator[str]:
    if not content.cells:
        yield "Not run yet."
        return
    yield (
        "Test scores: the mean over rules, and in brackets the worst and the best rule. Below, for each kind of "
        "feedback, means over runs. Seconds are over FST's on the same rule. `population`: candidates kept, over fast "
        "rounds. `mixed groups`: the share of groups whose rollouts were made under more than one prompt. Last, "
        "proposals accepted a run, in the first cycle and after it."
    )
    for family, cells in content.families.items():
        yield f"### {markdown(family)}: test scores"
        yield markdown_table(*page_tables.scores_by_kind(cells))
        for cell in cells:
            yield f"### {markdown(family)}, {code_span(cell.kind)}: cost and search"
            yield markdown_table(*page_tables.means_table(cell))
            yield _search_end(cell)


def _search_end(cell: Cell) -> str:
    """Whether FST's search went on after its first cycle."""
    rows = cell.rows(SUBJECT) if SUBJECT in cell.runs else []
    if not rows:
        return ""
    on = sum(row["accepted_later"] > 0 for row in rows)
    if on:
        return f"FST took in new prompts after its first cycle in {on} of {len(rows)} runs."
    return f"In none of {len(rows)} runs did FST take in a new prompt after its first cycle: its search ended there."


def _further(content: Content) -> Iterator[str]:
    if content.further:
        yield "## At another cap"
        yield "Runs that stand in no verdict: where a method levels off when it may go on."
        yield markdown_table(*page_tables.further_table(content.further))


def _section(name: str) -> sections.Section:
    known = {section.name: section for section in sections.SECTIONS}
    return known.get(name) or sections.Section(name, name.replace("-", " ").capitalize(), "")


def _experiment(content: Content, section: sections.Section) -> Iterator[str]:
    yield f"## {markdown(section.title)}"
    yield section.text
    data = content.experiments.get(section.name)
    if not data or not data["rows"]:
        yield f"Not run yet:\n\n{code_block(section.command)}"
        return
    rules = len({sections.unit_of(row) for row in data["rows"]})
    yield f"Means over {rules} rule{'s' * (rules != 1)} with 95% intervals."
    yield markdown_table(*sections.table(data["rows"], section))
    yield _figure(section.title, page_figures.file_name(section.name))


def _other_experiments(content: Content) -> Iterator[str]:
    known = {section.name for section in sections.SECTIONS}
    for name in content.experiments:
        if name not in known:
            yield from _experiment(content, _section(name))


def _again(content: Content, command: str) -> Iterator[str]:
    lines = [line for data in content.kept.values() for line in commands_of([data])]
    yield code_block("\n".join(dict.fromkeys([*lines, command.replace("\n", "\\n")])))
    for name, data in content.kept.items():
        versions = ", ".join(f"{key} {value}" for key, value in data.get("versions", {}).items())
        commits = ", ".join(data.get("commits", []))
        commit = f"; commit {markdown(commits)}" if commits else ""
        yield f"{code_span(name)}: {markdown(versions) or 'versions unknown'}{commit}."


def _appendix(content: Content) -> Iterator[str]:
    if not content.cells:
        return
    yield "## Appendix: rule by rule"
    yield (
        "Final test scores, and below them the rollouts to RL's best over RL's, at the ends of cycles; `≥`: never "
        "reached within the cap, so at least that."
    )
    for cell in content.cells:
        yield f"### {markdown(cell.family)}, {code_span(cell.kind)}: rule by rule"
        yield markdown_table(*page_tables.scores_table(cell))
        if (table := page_tables.shares_table(cell)) and len(table[0]) > 1:
            yield _with_rows(table)
    for family, cells in content.families.items():
        table = page_tables.instructions_table(cells)
        if table[1]:
            yield f"### {markdown(family)}: instructions that FST learned"
            yield _with_rows(table)


def _with_rows(table: HeadAndRows) -> str:
    return markdown_table(*table) if table[1] else ""
