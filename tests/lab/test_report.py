import io
import json
import re

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import read_run, save_comparison
from fst_optimizer.lab.figures import draw_all
from fst_optimizer.lab.report import verdict_lines, write_report
from fst_optimizer.progress.tables import rich_table
from fst_optimizer.text import plain
from helpers.runs import EXTRA, FST_CURVE, write_run


def test_verdicts_follow_the_numbers(fabricated):
    root, runs = fabricated
    missed = verdict_lines(save_comparison(runs, root, extra=EXTRA))
    assert [line.split(":")[0] for line in missed] == ["aim missed", "aim missed", "aim met"]
    assert "only 1 of 2 seeds" in missed[0] and "20.0 points" in missed[2]
    first_seed = save_comparison([run for run in runs if run.seed == 0], root, extra=EXTRA)
    # Half of RL's rollouts are more than a third; a quarter of its KL is less than a half.
    assert [line.split(":")[0] for line in verdict_lines(first_seed)] == ["aim missed", "aim met", "aim met"]


def test_the_lead_over_gepa_has_the_same_sign_whichever_method_comes_first(fabricated):
    root, runs = fabricated
    data = save_comparison(sorted(runs, key=lambda run: run.method, reverse=True), root, extra=EXTRA)
    data["differences"] = {"gepa - fst": {"test_score_after": {"mean": -0.2, "low": -0.3, "high": -0.1, "n": 3}}}
    assert "20.0 points above GEPA alone on test (0.200 [0.100, 0.300], n = 3)" in verdict_lines(data)[-1]


def test_the_report_is_made_of_the_numbers(fabricated, tmp_path):
    root, runs = fabricated
    draw_all(save_comparison(runs, root, extra=EXTRA), root)
    page = tmp_path / "docs" / "results.md"
    write_report([root.parent], page)
    text = page.read_text()
    assert "fst lab compare programs/letters --out out" in text
    assert "Drop the last letter." in text
    assert "| fst | 0 | 0.580 | 200 | 0.4000 | 100 | 0.50 | 0.1000 | 0.25 |" in text
    assert "RL sees one number a rollout" in text
    for name in ("letters-score_by_rollouts.png", "letters-kl_by_score.png"):
        assert f"figures/{name}" in text and (page.parent / "figures" / name).exists()


SCRIPT = "<script>alert(1)</script> [x](javascript:alert(1)) $\\frac{ [bold] [/x] \u202e"


def test_what_a_run_says_is_text_on_the_page_in_the_figures_and_in_the_terminal(tmp_path):
    root = tmp_path / "out" / "<b>[x](javascript:y)"
    folders = [
        write_run(root / f"{number}", method, 0, FST_CURVE, task=f"task ``` ` {SCRIPT}")
        for number, method in enumerate(("fst", "rl", "gepa"))
    ]
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        result["candidate"] = {SCRIPT: f"```\n\n{SCRIPT}"}
        (folder / "result.json").write_text(json.dumps(result))
    extra = EXTRA | {"command": f"fst ```\n```\n\n{SCRIPT}", "reflection_lm": SCRIPT}
    data = save_comparison([read_run(folder) for folder in folders], root, extra=extra)
    page = tmp_path / "docs" / "results.md"
    write_report([root], page)

    text = MarkdownIt("commonmark", {"html": True}).enable("table").render(page.read_text())
    assert "&lt;script&gt;" in text and not re.search(r"<script|<b>|<a |\u202e", text)
    assert [path.stat().st_size > 5000 for path in (page.parent / "figures").iterdir()] == [True, True]
    data["runs"] = [run | {"method": SCRIPT} for run in data["runs"]]
    assert len(draw_all(data, tmp_path / "figures")) == 2
    console = Console(file=io.StringIO(), width=500)
    console.print(rich_table(SCRIPT, (SCRIPT, "b"), [[SCRIPT, "2"]]))
    assert console.file.getvalue().count(plain(SCRIPT)) == 3


def test_a_folder_without_a_comparison_cannot_be_reported(tmp_path):
    with pytest.raises(UserError, match=r"has no compare\.json: make one with fst lab compare"):
        write_report([tmp_path], tmp_path / "page.md")


def test_two_folders_of_one_name_cannot_share_a_page(fabricated, tmp_path):
    root, runs = fabricated
    save_comparison(runs, root, extra=EXTRA)
    other = tmp_path / "other" / "letters"
    other.mkdir(parents=True)
    (other / "compare.json").write_text((root / "compare.json").read_text())
    with pytest.raises(UserError, match="two folders are called 'letters'"):
        write_report([root, other], tmp_path / "page.md")
