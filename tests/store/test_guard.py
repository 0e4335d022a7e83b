"""A folder that is no run's is not written into."""

from pathlib import Path

import pytest

from fst_optimizer import FST, UserError
from fst_optimizer.store.files import check_run_dir, open_run, write_json
from helpers.fst import LETTERS, fst
from helpers.toy import TRAIN, VAL, answer, metric, student_of


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"model_type": "qwen3"}),
        ("config.json", {"config": {}, "policy": "MlpPolicy", "data": "x"}),
        ("program.json", {"signature": {}}),
        ("metrics.jsonl", {}),
        ("notes.txt", {}),
        ("policy/policy-000001/weights", {}),
    ],
)
@pytest.mark.parametrize("way", ["python", "command"])
def test_somebodys_folder_is_refused_and_stays_as_it_was(scripted, tmp_path, name, content, way):
    folder = tmp_path / "mine"
    write_json(folder / name, content)
    before = files_in(folder)
    if way == "python":
        with pytest.raises(UserError, match=r"holds .*, and no run: give a new folder, or an empty one"):
            FST(metric, run_dir=folder).compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    else:
        said = fst("compile", LETTERS, "--run-dir", folder)
        assert said.exit_code == 2 and ", and no run: give a new folder, or an empty one" in said.stderr
    assert files_in(folder) == before


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name):
    with pytest.raises(UserError, match=r"run_dir is ' ?': give a"):
        FST(metric, run_dir=name)


def test_the_current_folder_the_root_and_a_home_are_no_places_for_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for place, said in ((".", "current directory"), ("/", "root of the file system"), (tmp_path / "home", "your home")):
        with pytest.raises(UserError, match=said):
            check_run_dir(Path(place), resume=False)
    said = fst("compile", LETTERS, "--run-dir", "")
    assert said.exit_code == 2 and "as an empty name is too" in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_an_empty_folder_and_what_a_run_left_that_ended_at_once_are_taken(tmp_path):
    for name in ("empty", "ended"):
        (tmp_path / name).mkdir()
    for name in (".lock", "vllm.log", ".gitkeep"):
        (tmp_path / "ended" / name).touch()
    for name in ("empty", "ended", "new"):
        assert open_run(tmp_path / name, resume=False)[1] is False


def test_a_half_written_file_that_is_a_link_is_not_written_through(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.write_text("the user's")
    run.mkdir()
    (run / ".config.json.tmp").symlink_to(outside)
    with pytest.raises(UserError, match="is a link and leads out of the run directory"):
        open_run(run, resume=False)
    assert outside.read_text() == "the user's"
