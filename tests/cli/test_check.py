"""`fst check`: every problem at once, and nothing written."""

import json
from pathlib import Path

import pytest

from helpers.fst import LETTERS, fst

SIZES = ("--train-size", "16", "--val-size", "8", "--test-size", "4", "--set", "policy.max_tokens=32")
TASK = """
import dspy

PROBLEMS = {problems!r}

def build_program(variant=None):
    class Own(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("letters -> answer")

        def forward(self, letters):
            if "program" in PROBLEMS:
                letters = letter
            return self.answer(letters=letters)

    return Own()

def metric(example, prediction):
    return 50 if "metric" in PROBLEMS else 0.5

def load(split, size=None, seed=0, variant=None):
    if split == "test" and "data" in PROBLEMS:
        raise FileNotFoundError("test.jsonl")
    start = 100 * ("train", "val", "test").index(split)
    return [dspy.Example(letters=f"a {{start + n}}", answer="a").with_inputs("letters") for n in range(size or 4)]

def model():
    return {model!r}
"""
MODEL = Path(__file__).parents[2] / "programs" / "letters" / "model"


@pytest.fixture
def task(tmp_path):
    def write(*problems):
        folder = tmp_path / f"own-{'-'.join(problems)}"
        folder.mkdir()
        (folder / "task.py").write_text(TASK.format(problems=problems, model=str(MODEL)))
        return folder

    return write


def checked(*arguments):
    said = fst("check", *arguments, "--json")
    return {(one["name"], one["level"]): one["text"] for one in json.loads(said.stdout)}, said.exit_code


def test_a_task_that_works_is_ok_line_by_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fst("check", LETTERS, *SIZES, "--run-dir", tmp_path / "run")
    assert said.exit_code == 0, said.output
    names = [line.split(":")[0] for line in said.stdout.splitlines()]
    assert [name for name in names if not name.endswith(("scores", "answers", "program"))] == [
        *("ok task", "ok settings", "ok data", "ok student", "ok model", "ok run_dir", "ok budget"),
        *("ok calls", "ok reflection", "ok plan"),
    ]
    assert "16 train, 8 val, 4 test" in said.stdout and "at most " in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_the_student_shows_is_told_with_what_the_settings_show(task, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "result.json").write_text("{}")
    found, code = checked(task("metric"), *SIZES, "--run-dir", taken, "--set", "budget.max_rollouts=2")
    assert code == 1
    assert [name for name, level in found if level == "fail"] == ["run_dir", "budget", "scores"]
    assert "outside [0, 1] (50 on train-0, 50 on train-1)" in found["scores", "fail"]


def test_a_program_that_raises_is_told_with_its_last_lines_on_one_line(task):
    said = fst("check", task("program"), *SIZES)
    assert said.exit_code == 1
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("fail ")]
    assert line.startswith("fail program: the program raised on both train-0 and train-1: ")
    assert "letters = letter" in line and line.endswith("NameError: name 'letter' is not defined")
    assert all(line.startswith(("ok ", "warn ", "fail ")) for line in said.stdout.splitlines())


def test_all_that_can_be_checked_without_the_student_is_checked(task, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    arguments = ("--engine", "torhc", "--set", "trian.lr=1", "--reflection-lm", "openai/gpt-5.2")
    found, code = checked(task("data"), *SIZES, *arguments, "--run-dir", task() / "task.py")
    assert code == 1
    assert [name for name, level in found if level == "fail"] == ["engine", "settings", "data", "reflection", "run_dir"]
    assert "did you mean 'torch'" in found["engine", "fail"] and "did you mean 'train.lr'" in found["settings", "fail"]
    assert found["data", "fail"] == "FileNotFoundError: test.jsonl"
    assert found["rollouts", "warn"] == "not checked, as this failed: engine, settings, data, reflection"
    assert found["student", "ok"] == "Own with predictors answer"


def test_the_reflection_lm_is_tried_also_where_there_is_no_model(task, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-at-all")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    found, code = checked(task(), *SIZES, "--model", "/no/such/model", "--reflection-lm", "openai/gpt-5.2")
    assert code == 1
    assert {name for name, level in found if level == "fail"} == {"engine", "reflection"}
    assert "the reflection LM openai/gpt-5.2 failed" in found["reflection", "fail"]
    assert "sk-not" not in json.dumps(list(found.values()))


def test_an_unknown_task_leaves_the_settings_to_check(tmp_path):
    found, code = checked(tmp_path / "nothing", "--set", "train.lr=-1")
    assert code == 1
    assert [name for name, level in found if level == "fail"] == ["task", "settings"]
