"""A comparison that really runs, from the command to the page: what runs write, and what the page reads, are one."""

import json

import pytest

from fst_optimizer.lab.content import content_of
from fst_optimizer.lab.report import page
from fst_optimizer.lab.rows import find_kept, keep
from fst_optimizer.store.files import read_json
from helpers.fst import LETTERS, fst
from helpers.rows import row
from helpers.run_check import assert_as_designed

CAP = 200
SETTINGS = [
    *("--methods", "fst,rl", "--kinds", "told,scored", "--seeds", "7", "--max-rollouts", CAP, "--jobs", "2"),
    # Without the task's own reflectors, which are models too: three runs have enough to load.
    *("--reflection-lm", "extractive", "--train-size", "32", "--val-size", "16", "--test-size", "16"),
    *("--set", "train.steps_per_cycle=1", "--set", "rollout.batch_size=4", "--set", "policy.max_tokens=32"),
    *("--set", "fast.anchor_size=4", "--set", "fast.max_rollouts=24", "--set", "eval.kl_examples=4"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_of_200_rollouts_makes_the_page(tmp_path):
    out = tmp_path / "table"
    said = fst("lab", "compare", LETTERS, "--out", out, *SETTINGS)
    assert said.exit_code == 0, said.output
    runs = {path.parent for path in out.glob("*/*/result.json")}
    assert sorted(run.relative_to(out).as_posix() for run in runs) == [
        "sort-rotate+scored/fst-seed7",
        "sort-rotate+told/fst-seed7",
        "sort-rotate/rl-seed7",
    ]

    # One start: the same weights, data, instructions and so the same scores before anything was learned.
    configs = [read_json(run / "config.json") for run in runs]
    results = [read_json(run / "result.json") for run in runs]
    for name in ("fingerprint", "lora", "seed", "start_version"):
        assert len({json.dumps(config["policy"][name]) for config in configs}) == 1, name
    for name in ("val_score_before", "test_score_before", "seed"):
        assert len({result[name] for result in results}) == 1, name
    assert len({json.dumps(config["program"]["instructions"]) for config in configs}) == 1

    # Schema and counts of what is kept.
    kept = find_kept([out])["table"]
    rows = kept["rows"]
    assert {frozenset(one) for one in rows} == {frozenset(row())}, "a row has other fields than the page's tests have"
    assert (
        len(rows) == len(runs) and len({one["start"] for one in rows}) == 1
    )  # both kinds hold the run of rl, kept once
    by_folder = {(one["task"], one["method"]): one for one in rows}
    assert len(by_folder) == len(runs)
    for run in runs:
        assert_as_designed(run)
        result = read_json(run / "result.json")
        one, counts = by_folder[result["task"], result["method"]], result["rollouts"]
        assert 0 < counts["fast"] + counts["slow"] <= CAP == one["cap"]
        assert (one["fast"], one["slow"], one["eval"]) == (counts["fast"], counts["slow"], counts["eval"])
        assert one["curve"][0][:2] == [0, pytest.approx(result["val_score_before"], abs=1e-4)]
        assert one["curve"][-1][0] == one["fast"] + one["slow"] and one["curve"][-1][3] == 1
        assert max(point[1] for point in one["curve"]) == pytest.approx(result["val_score_after"], abs=1e-4)
        assert (one["rounds"] > 0) is (one["method"] == "fst") and one["steps"] > 0
        assert one["instructions"] == result["candidate"] and one["val_examples"] == one["test_examples"] == 16
    assert by_folder[f"{LETTERS}+told", "fst"]["accepted_first"] > 0  # the rule is in the feedback: it is found

    # And the page of it, by way of what is kept.
    (path,) = keep({"table": kept}, tmp_path / "kept")
    assert path.stat().st_size < 3000 * len(rows)
    text = page(content_of([tmp_path / "kept"]), "fst lab report kept")
    assert "On each rule all methods start from the same weights and data." in text
    for kind in ("told", "scored"):
        scores = {method: by_kind(rows, kind, method)["test_score_after"] for method in ("fst", "rl")}
        assert f"### letters, `{kind}`: rule by rule" in text
        assert f"| 7 | {scores['fst']:.3f} | {scores['rl']:.3f} |" in text
    assert (
        "| fst | prompts and weights, in turns | feedback; extractive | feedback; extractive | nothing else |" in text
    )
    assert text.count("undecided") == 4  # one seed of one rule decides nothing
    assert "**Where FST loses.** By these measures it loses nowhere." in text


def by_kind(rows, kind, method):
    """The row that stands for a method under a kind."""
    return next(one for one in rows if one["method"] == method and (one["kind"] == kind or not one["reads_feedback"]))
