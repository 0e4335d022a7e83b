import io
from pathlib import Path

from rich.console import Console

from fst_optimizer.progress.tables import closing, from_python, show

RESULT = {
    "task": "programs/letters",
    "method": "fst",
    "seed": 0,
    "val_score_before": 0.25,
    "val_score_after": 0.75,
    "test_score_before": None,
    "test_score_after": None,
    "rollouts": {"fast": 24, "slow": 128, "eval": 64, "reused": 20},
    "steps": 2,
    "cycles": 1,
    "reflection_calls": 6,
    "cost_usd": None,
    "wall_s": 61.0,
    "kl_to_base": 0.0123,
    "policy_version": 2,
    "candidate": {"first": "Sort.\x1b[2J\x1b]0;owned\x07 [red]not markup[/red]"},
    "ended": "done",
}


class Mine:
    """A program of the user's."""


def shown(result):
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    show(console, closing(result, from_python(Path("runs/a"), Mine)))
    return out.getvalue()


def test_what_a_model_wrote_cannot_command_the_terminal():
    text = shown(RESULT)
    assert "\x1b[2J" not in text and "\x07" not in text
    assert "\\x1b[2J" in text and "[red]not markup[/red]" in " ".join(text.split())


def test_the_closing_table_has_scores_costs_and_what_to_do_next():
    text = shown(RESULT)
    for expected in ("0.2500", "0.7500", "+0.500", "fast 24", "reused 20", "0.0123", "1:01", "unknown price"):
        assert expected in text
    assert "fst_optimizer.load('runs/a', program=Mine())" in text


def test_without_a_test_set_there_is_no_row_for_it():
    assert "test" not in shown(RESULT)
    assert "test " in shown(RESULT | {"test_score_before": 0.5})


def test_the_commonest_failure_is_shown_with_its_share_and_the_first_error_on_one_line():
    first = {"outcome": "timeout", "text": "late\nin \x1b[2J" + "x" * 400, "example": "val-3"}
    outcomes = {"ok": 150, "parse_error": 54, "timeout": 12}
    (line,) = [
        line for line in shown(RESULT | {"outcomes": outcomes, "first_error": first}).splitlines() if "failed" in line
    ]
    assert line.startswith("failed    parse_error 54 of 216 (25%); the first: timeout on val-3: late in \\x1b[2Jxxx")
    assert len(line) < 270
    assert "failed" not in shown(RESULT | {"outcomes": {"ok": 216}, "first_error": None})
    assert "failed" not in shown(RESULT), "a run of an older version"
