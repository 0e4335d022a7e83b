import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import save_comparison
from fst_optimizer.lab.figures import draw_all
from fst_optimizer.lab.report import verdict_lines, write_report
from helpers.runs import EXTRA


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
