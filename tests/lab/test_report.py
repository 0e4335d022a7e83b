import io
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import read_run, save_comparison
from fst_optimizer.lab.content import content_of
from fst_optimizer.lab.figures import draw_all
from fst_optimizer.lab.page_figures import checksum, stamp_of
from fst_optimizer.lab.report import figures_of, page, write_report
from fst_optimizer.lab.rows import keep
from fst_optimizer.progress.tables import rich_table
from fst_optimizer.text import plain
from helpers.rows import kept, row, rows_of
from helpers.runs import EXTRA, FST_CURVE, write_run

ROOT = Path(__file__).parents[2]
KEPT, PAGE = Path("docs/results"), Path("docs/results.md")
COMMAND = f"fst lab report {KEPT} --out {PAGE}"
RULES = "abcde"


def scores(*values):
    return dict(zip(RULES, values, strict=True))


COMPARED = rows_of(
    {
        "fst": scores(0.9, 0.8, 0.7, 0.9, 1.0),
        "rl": scores(0.8, 0.6, 0.4, 0.5, 0.5),
        "sft": scores(1.0, 0.9, 0.9, 1.0, 1.0),
        "gepa": scores(0.9, 0.7, 0.8, 0.8, 1.0),
    }
) + rows_of({"fst": scores(0.5, 0.4, 0.6, 0.5, 0.5), "gepa": scores(0.1, 0.1, 0.2, 0.1, 0.0)}, kind="shown")


@pytest.fixture
def written(tmp_path):
    """The page of these files, as they are kept; with `draw` written down with its figures."""

    def write(draw=False, **files):
        keep(files, tmp_path / "results")
        if not draw:
            return page(content_of([tmp_path / "results"]), "fst lab report results")
        write_report([tmp_path / "results"], tmp_path / "results.md")
        return (tmp_path / "results.md").read_text()

    return write


def section(text, head):
    """What stands under a heading, up to the next one of any level."""
    return re.split(r"^#+ ", text.split(f"## {head}\n", 1)[1], flags=re.MULTILINE)[0]


def test_the_published_page_is_what_the_kept_json_gives_byte_for_byte(monkeypatch):
    monkeypatch.chdir(ROOT)
    content = content_of([KEPT])
    assert PAGE.read_text() == page(content, COMMAND), f"make it again: {COMMAND}"
    figures = figures_of(content)
    drawn = {path.name: stamp_of(path) for path in (PAGE.parent / "figures").glob("*.png")}
    assert drawn == {name: checksum(data) for name, data in figures.items()}, f"make them again: {COMMAND}"


def test_where_fst_loses_comes_first(written):
    short = section(written(table=kept(COMPARED)), "In short")
    lost, undecided, won = (
        short.index(head) for head in ("**Where FST loses.**", "**Undecided.**", "**Where FST wins.**")
    )
    assert lost < undecided < won
    assert "- letters, `told`: `sft` -0.100 [-0.1" in short[lost:undecided]
    assert "- letters, `shown`: `sft` -0.460" in short[lost:undecided]
    assert "`gepa` +0.020 [" in short[undecided:won] and "share of RL's rollouts 0.30 [0.30, 0.30]" in short[won:]
    assert "`rl` +0.300 [+0.104, +0.496]" in short[won:] and "`gepa` +0.400" in short[won:]


def test_where_it_loses_nowhere_that_is_said(written):
    text = written(table=kept(rows_of({"fst": scores(*[0.9] * 5), "gepa": scores(*[0.5] * 5)})))
    assert "**Where FST loses.** By these measures it loses nowhere." in text


def test_the_page_says_what_each_method_was_told(written):
    told = section(written(table=kept(COMPARED)), "What each method was told")
    for line in (
        "- `told`: feedback says the rule, as a sentence.",
        "- `shown`: feedback says what was got and what was right.",
        "| fst | prompts and weights, in turns | feedback; extractive | feedback; a/reflector | nothing else |",
        "| rl | weights | the score alone | the score alone | nothing else |",
        "| sft | weights, from right answers | right answers | right answers | right answers |",
        "Programs start from: `Answer the question.`.",
    ):
        assert line in told


def test_a_method_that_was_given_other_instructions_is_told_of(written):
    wrong = [
        one
        | {"method": "fst+wrong", "given_instructions": True, "seed_instructions": {"first": "Wrong."}}
        | {"val_score_before": 0.1}
        for one in COMPARED
        if one["method"] == "fst"
    ]
    text = written(table=kept([*COMPARED, *wrong]))
    assert "| feedback; extractive | feedback; a/reflector | other instructions to start from |" in text
    assert "Programs start from: `Answer the question.`." in text
    assert "On each rule all methods start from the same weights and data." in text


def test_settings_of_a_methods_own_are_told(written):
    settings = {"letters": {"fst": {"train.lr": 0.002}, "rl": {"train.lr": 0.002, "train.kl_coef": 0.1}}}
    told = section(written(table=kept(COMPARED, settings=settings)), "What each method was told")
    assert "| letters | rl | train.kl_coef=0.1 |" in told and "train.lr" not in told


def test_means_tell_costs_and_how_long_the_search_went_on(written):
    text = written(table=kept([*COMPARED, row("rl", 0.7, rule="a", cap=10_000)]))
    assert "| fst | 5 | 300 | 6 | 1.00 | 0.100 | 1.5 | 0.50 | 2.0 | 0.0 |" in text
    assert "| rl | 5 | 240 | 0 | 0.50 | 0.800 | - | 0.50 | - | - |" in text
    assert "| fst | 0.860 (0.70 to 1.00) | 0.500 (0.40 to 0.60) |" in text
    assert "In none of 5 runs did FST take in a new prompt after its first cycle: its search ended there." in text
    later = section(text, "At another cap")
    assert "| letters | a | told | rl | 0 | 10000 | 0.50 at 100, 0.58 at 200, 0.60 at 300 | 0.700 |" in later
    on = written(table=kept([one | {"accepted_later": 1} for one in COMPARED]))
    assert "FST took in new prompts after its first cycle in 5 of 5 runs." in on


def test_the_appendix_has_every_rule_and_says_what_was_never_reached(written):
    appendix = written(table=kept(COMPARED)).split("## Appendix")[1]
    assert "| a | 0.900 | 0.800 | 1.000 | 0.900 |" in appendix
    assert (
        "| a | 0.30 | ≥ 1.50 |" in appendix
        and "| median | 0.30 [0.30, 0.30] | at least 1.50 [1.50, no limit] |" in appendix
    )
    assert "| told | a | 0 | 0.900 | first: Drop the first letter. |" in appendix


def test_methods_that_started_elsewhere_are_told_of(written):
    assert "On each rule all methods start from the same weights and data." in written(table=kept(COMPARED))
    other = [COMPARED[0] | {"start": "another"}, *COMPARED[1:]]
    assert "**Not all methods of a rule started from the same weights and data.**" in written(table=kept(other))


def test_parts_that_were_not_run_are_named_with_their_command(written):
    text = written(drift=kept([]))
    assert text.count("Not run yet") == 10
    assert "fst lab compare TASK:RULE" in section(text, "In short")
    assert "fst lab drift" in section(text, "Drift")


def test_experiments_have_a_table_and_a_figure_each(written, tmp_path):
    cells = {"base": 0.1, "prompt": 0.3, "weights": 0.5, "both": 0.9, "interaction": {"mean": 0.2, "low": 0, "high": 1}}
    rows = [{"task": f"programs/letters:{rule}", "method": "fst", "rule": rule, "seed": 0, **cells} for rule in "abc"]
    text = written(draw=True, decompose=kept(rows), own=kept([rows[0] | {"speed": 3.0}]))
    own = section(text, "What the prompt learned, and what the weights learned")
    assert (
        "| letters | told | fst | 3 | 0.100 ±0.000 | 0.300 ±0.000 | 0.500 ±0.000 | 0.900 ±0.000 | 0.200 ±0.000 |" in own
    )
    assert "(figures/decompose.png)" in own and stamp_of(tmp_path / "figures" / "decompose.png")
    assert "| family | kind | method | rules | base |" in section(text, "Own")


def test_figures_show_the_kept_curves(written, tmp_path):
    written(draw=True, table=kept([one for one in COMPARED if one["rule"] == "a"]))
    data = figures_of(content_of([tmp_path / "results"]))["letters-a.png"]
    assert list(data["panels"]) == ["told", "shown"]
    # The evaluation between a round and its steps is not on the curve; sft is evaluated at its ends alone.
    assert data["panels"]["told"]["fst"] == [{"line": [[0, 0.2], [60, 0.6], [300, 0.8]]}]
    assert data["panels"]["shown"]["sft"] == [{"dots": [[0, 0.9]]}]
    path = tmp_path / "figures" / "letters-a.png"
    assert stamp_of(path) == checksum(data) and path.stat().st_size < 40_000


def test_remarks_are_taken_over_as_they_are(written, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "remarks.md").write_text("One run is missing: *why*.\n")
    assert "\n\nOne run is missing: *why*.\n\n" in written(table=kept(COMPARED))


def test_the_same_json_gives_the_same_page_by_way_of_what_is_kept(fabricated, tmp_path):
    root, runs = fabricated
    save_comparison(runs, root, extra=EXTRA)
    direct, kept_in = tmp_path / "direct.md", tmp_path / "kept"
    write_report([root.parent], direct)
    paths = write_report([root.parent], tmp_path / "docs.md", kept_in)
    assert [path.name for path in paths] == ["out.json", "letters-default.png", "docs.md"]
    lines = [path.read_text().splitlines() for path in (direct, tmp_path / "docs.md")]
    different = [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]
    assert [one.startswith("fst lab report") for pair in different for one in pair] == [True, True]
    assert "fst lab compare programs/letters --out out" in lines[0]


SCRIPT = "<script>alert(1)</script> [x](javascript:alert(1)) $\\frac{ [bold] [/x] \u202e"


def test_what_a_run_says_is_text_on_the_page_in_the_figures_and_in_the_terminal(tmp_path):
    root = tmp_path / "out" / "<b>[x](javascript:y)"
    folders = [
        write_run(root / f"{number}", method, 0, FST_CURVE, task=f"task ``` ` {SCRIPT}:{SCRIPT}")
        for number, method in enumerate(("fst", "rl", "gepa"))
    ]
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        result["candidate"] = {SCRIPT: f"```\n\n{SCRIPT}"}
        (folder / "result.json").write_text(json.dumps(result))
    extra = EXTRA | {"command": f"fst ```\n```\n\n{SCRIPT}", "reflection_lm": SCRIPT}
    data = save_comparison([read_run(folder) for folder in folders], root, extra=extra)
    data["rows"] = [
        one | {"reflector": SCRIPT, "commit": SCRIPT, "seed_instructions": {SCRIPT: SCRIPT}, "rule": SCRIPT}
        for one in data["rows"]
    ]
    (root / "compare.json").write_text(json.dumps(data))
    path = tmp_path / "docs" / "results.md"
    write_report([root], path)

    text = MarkdownIt("commonmark", {"html": True}).enable("table").render(path.read_text())
    assert "&lt;script&gt;" in text and not re.search(r"<script|<b>|<a |\u202e", text)
    assert [drawn.stat().st_size > 3000 for drawn in (path.parent / "figures").iterdir()] == [True]
    data["runs"] = [run | {"method": SCRIPT} for run in data["runs"]]
    assert len(draw_all(data, tmp_path / "figures")) == 2
    console = Console(file=io.StringIO(), width=500)
    console.print(rich_table(SCRIPT, (SCRIPT, "b"), [[SCRIPT, "2"]]))
    assert console.file.getvalue().count(plain(SCRIPT)) == 3


def test_a_folder_without_a_comparison_cannot_be_reported(tmp_path):
    with pytest.raises(
        UserError, match=r"has no JSON file with rows and no compare\.json: make one with fst lab compare"
    ):
        write_report([tmp_path], tmp_path / "page.md")
