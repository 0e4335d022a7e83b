import json
import math
import os

import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.store.files import (
    ADAPTER_TENSORS,
    RunFiles,
    in_use,
    locked,
    open_run,
    read_json,
    runs_in,
    write_json,
)

MARKS = {"task": "toy", "config": {}, "policy": {}, "data": {}, "versions": {}}
"""What `config.json` of every run has had."""


def test_a_new_directory_is_made_with_its_parents(tmp_path):
    files, resuming = open_run(tmp_path / "runs" / "one", resume=False)
    assert files.root.is_dir()
    assert not resuming


def begun(folder):
    """What a run leaves that was killed before its first checkpoint."""
    write_json(folder / "config.json", MARKS)
    return folder


@pytest.mark.parametrize("made", [False, True])
def test_asking_to_resume_where_no_run_is_refused_with_the_runs_that_may_be_meant(tmp_path, made):
    if made:
        (tmp_path / "frist").mkdir()
    with pytest.raises(UserError, match=r"frist' holds no run to resume: leave --resume \(resume=True\) out"):
        open_run(tmp_path / "frist", resume=True)
    begun(tmp_path / "first")
    begun(tmp_path / "other")
    with pytest.raises(UserError, match=r"holds no run to resume \(there is \S*/first\): leave --resume"):
        open_run(tmp_path / "frist", resume=True)
    write_json(tmp_path / "first" / "result.json", {})
    with pytest.raises(UserError, match=r"\(there is \S*/first \(finished\)\)"):
        open_run(tmp_path / "frist", resume=True)
    with pytest.raises(UserError, match=r"\(there is \S*/(first|other).*, \S*/(first|other)"):
        open_run(tmp_path, resume=True)  # the folder of the runs instead of a run
    assert (tmp_path / "frist").exists() is made


def test_resuming_a_run_that_died_before_its_first_checkpoint_starts_over_and_says_so(tmp_path, caplog):
    assert open_run(begun(tmp_path / "run"), resume=True)[1] is False
    assert "ended before its first checkpoint: it starts from the beginning" in caplog.text


def test_runs_are_found_newest_first_and_other_folders_are_not(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        os.utime(begun(tmp_path / name) / "config.json", (1000 - age, 1000 - age))
    write_json(tmp_path / "model" / "config.json", {"model_type": "qwen3"})
    assert [path.name for path in runs_in(tmp_path)] == ["new", "middle", "old"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_refused(tmp_path, resume):
    write_json(tmp_path / "result.json", {})
    write_json(tmp_path / "state.json", {})
    with pytest.raises(UserError, match=r"run_dir .* holds a finished run: give another directory"):
        open_run(tmp_path, resume=resume)


def test_an_unfinished_run_needs_resume(tmp_path):
    write_json(tmp_path / "state.json", {})
    with pytest.raises(UserError, match=r"holds an unfinished run: resume it \(--resume"):
        open_run(tmp_path, resume=False)
    assert open_run(tmp_path, resume=True)[1] is True


def test_a_file_in_the_directorys_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"is a file: give a directory"), locked(tmp_path / "run"):
        raise AssertionError


def test_a_directory_has_one_writer_at_a_time_and_the_lock_goes_with_it(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match="is being written by another process"), locked(tmp_path / "run"):
            raise AssertionError
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("there", ["a file", "no file"])
def test_a_lock_that_is_a_link_is_refused_and_nothing_is_made_or_changed_where_it_leads(tmp_path, there):
    outside, run = tmp_path / "outside", tmp_path / "run"
    if there == "a file":
        outside.write_text("the user's")
    run.mkdir()
    (run / ".lock").symlink_to(outside)
    with pytest.raises(UserError, match=r"\.lock is a link, or no file: remove it"), locked(run):
        raise AssertionError
    assert outside.exists() == (there == "a file")
    assert there == "no file" or outside.read_text() == "the user's"
    assert not in_use(run)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_refused_and_hangs_nobody(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is a link, or no file"), locked(tmp_path):
        raise AssertionError


def test_who_holds_a_directory_is_seen_from_outside(tmp_path):
    assert not in_use(tmp_path / "none")
    with locked(tmp_path / "run"):
        assert in_use(tmp_path / "run")
    assert not in_use(tmp_path / "run")


def test_starting_over_clears_what_a_dead_run_left_and_nothing_else(tmp_path):
    files = RunFiles(tmp_path)
    for path in (files.metrics, files.population(0), files.rollouts(0), files.policy(1) / ADAPTER_TENSORS):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left over")
    kept = ["checkpoint/1000/model.pt", "notes.txt", "policy/mine.txt", "policy/policy-mine/notes.txt"]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the user's")
    with pytest.raises(UserError, match=r"holds .checkpoint. and 5 more, and no run: give a new folder"):
        open_run(tmp_path, resume=False)
    write_json(files.config, MARKS)
    open_run(tmp_path, resume=False)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([*kept, "config.json"])


def test_a_run_that_lost_its_state_is_no_empty_directory(tmp_path):
    write_json(RunFiles(tmp_path).config, MARKS)
    write_json(RunFiles(tmp_path).checkpoint(1) / "state.json", {})
    assert not open_run(tmp_path, resume=False)[1]  # nothing was paid for yet
    write_json(RunFiles(tmp_path).checkpoint(3) / "state.json", {})
    with pytest.raises(UserError, match="holds an unfinished run"):
        open_run(tmp_path, resume=False)
    assert open_run(tmp_path, resume=True)[1]


@pytest.mark.parametrize("linked", ["metrics.jsonl", "journal", "population/cycle-000000.json"])
def test_a_link_that_leads_out_of_the_directory_is_refused(tmp_path, linked):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.write_text("the user's")
    (run / linked).parent.mkdir(parents=True)
    (run / linked).symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the run directory"):
        open_run(run, resume=False)
    assert outside.read_text() == "the user's"


def test_paths_are_those_that_other_programs_read(tmp_path):
    files = RunFiles(tmp_path)
    names = [
        files.checkpoint(3),
        files.journal(3),
        files.policy(12),
        files.population(0),
        files.rollouts(7),
        files.program,
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in names] == [
        "checkpoint/000003",
        "journal/000003.jsonl",
        "policy/policy-000012",
        "population/cycle-000000.json",
        "rollouts/cycle-000007.jsonl",
        "program.json",
    ]


@pytest.mark.parametrize("version", ["../../elsewhere", 1.5, True, None])
def test_a_version_that_is_no_number_names_no_folder(tmp_path, version):
    with pytest.raises(UserError, match="which is no number"):
        RunFiles(tmp_path).adapter(version)


@pytest.mark.parametrize("linked", ["policy", "policy/policy-000001", "policy/policy-000001/adapter_model.safetensors"])
def test_an_adapter_that_lies_outside_is_not_read(tmp_path, linked):
    run, outside = tmp_path / "run", tmp_path / "outside"
    folder = run / "policy" / "policy-000001"
    folder.mkdir(parents=True)
    (folder / ADAPTER_TENSORS).write_text("")
    assert RunFiles(run).adapter(1) == folder
    (run / linked).rename(outside)
    (run / linked).symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the run directory"):
        RunFiles(run).adapter(1)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"ä": 1})
    for bad in ({"score": math.nan}, {"thing": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert read_json(path) == {"ä": 1}


@pytest.mark.parametrize(
    ("content", "named"), [(None, "no such file"), ("{", "not readable as JSON"), ("[1]", "holds list, not an object")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, named):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=named):
        read_json(path)


def test_written_json_is_plain(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": [1, None]}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
