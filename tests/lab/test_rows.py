import json

import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.lab.compare import save_comparison
from fst_optimizer.lab.methods import reads_feedback
from fst_optimizer.lab.rows import find_kept, gathered, keep, kept_text, parts_of
from helpers.runs import EXTRA


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("programs/letters", ("letters", "default", "told")),
        ("programs/letters:sort-rotate", ("letters", "sort-rotate", "told")),
        ("programs/letters:drop_first.sort-rotate+shown", ("letters", "drop_first.sort-rotate", "shown")),
        ("programs.parcels:a+scored", ("parcels", "a", "scored")),
        ("my/own/task:a+b", ("task", "a+b", "told")),
    ],
)
def test_a_task_has_a_family_a_rule_and_a_kind_of_feedback(task, parts):
    assert parts_of(task) == parts


def test_methods_without_a_fast_side_read_no_feedback():
    searching = {"fast": {}}
    assert [
        method for method in ("fst", "fst+k1", "rl", "rl+sweep", "sft", "gepa") if reads_feedback(method, searching)
    ] == [
        "fst",
        "fst+k1",
        "gepa",
    ]
    assert reads_feedback("once", {"fast": {"once_rollouts": 48}})
    assert not reads_feedback("once", {"fast": {"once_rollouts": 0}})


def test_what_is_kept_of_a_run_is_small_and_has_its_curve(fabricated):
    root, runs = fabricated
    data = save_comparison(runs, root, extra=EXTRA)
    row = data["rows"][0]
    assert (row["family"], row["rule"], row["kind"], row["method"], row["seed"]) == (
        "letters",
        "default",
        "told",
        "fst",
        0,
    )
    assert row["curve"] == [[0, 0.2, 0.0, 1], [50, 0.57, 0.05, 1], [100, 0.7, 0.1, 1]]
    assert (row["fast"], row["slow"], row["seconds"]) == (60, 40, 10.0)
    assert (row["test_score_after"], row["val_examples"], row["test_examples"]) == (0.7, 100, 100)
    assert (row["rounds"], row["accepted_later"], row["population"], row["mixed"]) == (0, 0, None, None)
    assert len({one["start"] for one in data["rows"]}) == 1
    assert len(json.dumps(row)) < 1200


def test_comparisons_are_gathered_into_one_file_that_reads_back_the_same(fabricated, tmp_path):
    root, runs = fabricated
    data = save_comparison(runs, root, extra=EXTRA)
    found = find_kept([root.parent])
    assert list(found) == ["out"] and found["out"]["rows"] == data["rows"]
    assert found["out"]["settings"]["letters"]["fst"] == {}  # a learning rate of 1e-3 is the default
    (path,) = keep(found, tmp_path / "kept")
    text = path.read_text()
    assert find_kept([tmp_path / "kept"]) == found and kept_text(json.loads(text)) == text
    # A row a line, behind the lines of the head.
    lines = text.splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[-2 - len(runs) : -2]] == data["rows"]


def test_commands_of_several_tasks_are_one():
    one = {"command": "fst lab compare a b", "versions": {}, "model": "m", "settings": {}, "rows": []}
    assert gathered([one, one])["command"] == "fst lab compare a b"


def test_a_run_that_serves_several_kinds_is_kept_once():
    def compared(kind):
        shared = {"family": "letters", "method": "rl", "kind": "told", "commit": None}
        own = {"family": "letters", "method": "fst", "kind": kind, "commit": None}
        settings = {"rl": {}, "fst": {}}
        return {"command": "c", "versions": {}, "model": "m", "settings": settings, "rows": [own, shared]}

    rows = gathered([compared("told"), compared("shown")])["rows"]
    assert [(row["method"], row["kind"]) for row in rows] == [("fst", "told"), ("rl", "told"), ("fst", "shown")]


def test_a_folder_without_rows_is_refused_and_so_are_two_of_one_name(fabricated, tmp_path):
    root, runs = fabricated
    with pytest.raises(UserError, match=r"no JSON file with rows and no compare\.json: make one with fst lab compare"):
        find_kept([tmp_path])
    save_comparison(runs, root, extra=EXTRA)
    keep(find_kept([root.parent]), tmp_path / "kept")
    with pytest.raises(UserError, match="two files are called 'out'"):
        find_kept([root.parent, tmp_path / "kept"])
