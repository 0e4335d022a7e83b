import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.tasks import load_task

TASK = """
import dspy
from .words import GREETING

def build_program(variant=None):
    return dspy.Predict(dspy.Signature("question -> answer", f"{GREETING} {variant}"))

def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    return 1.0

def load(split, size=None, seed=0, variant=None):
    if split not in ("train", "val", "test"):
        raise ValueError(f"no split {split!r}")
    return [dspy.Example(question=f"{split}{i}").with_inputs("question") for i in range(size or 3)]
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-task"
    folder.mkdir()
    (folder / "words.py").write_text('GREETING = "Hello"\n')
    (folder / "task.py").write_text(TASK)
    return folder


def test_a_folder_with_a_task_is_loaded_with_its_siblings_and_variant(folder):
    task = load_task(f"{folder}:loud")
    assert (task.variant, task.name) == ("loud", f"{folder}:loud")
    assert task.build_program().signature.instructions == "Hello loud"
    assert [example.question for example in task.load("val", size=2)] == ["val0", "val1"]
    assert task.metric(None, None) == 1.0


def test_a_task_needs_neither_config_nor_model(folder):
    task = load_task(str(folder))
    assert (task.variant, task.config(), task.model()) == (None, None, None)


def test_what_a_task_may_know_besides_is_asked_with_its_variant_where_it_takes_one(folder):
    bare = load_task(str(folder))
    assert (bare.instructions(), bare.answers(bare.load("val", 1)[0]), bare.probes()) == (None, None, None)
    other = folder.with_name("knowing")
    folder.rename(other)
    (other / "task.py").write_text(
        TASK
        + """
def instructions(variant=None):
    return {"self": f"Say it {variant}."}

def answers(example, variant=None):
    return {"self": {"answer": f"{example.question} {variant}"}}

def probes():
    return ["loud", "quiet"]
"""
    )
    task = load_task(f"{other}:loud")
    assert task.instructions() == {"self": "Say it loud."}
    assert task.answers(task.load("val", 1)[0]) == {"self": {"answer": "val0 loud"}}
    assert task.probes() == ["loud", "quiet"]


def test_a_relative_folder_is_found_from_where_one_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_task("my-task").build_program()
    assert load_task("./my-task/").build_program()


def test_two_folders_of_one_name_are_two_tasks(folder, tmp_path):
    other = tmp_path / "other" / "my-task"
    other.mkdir(parents=True)
    (other / "task.py").write_text(TASK)
    (other / "words.py").write_text('GREETING = "Goodbye"\n')
    greetings = [load_task(str(place)).build_program().signature.instructions for place in (folder, other)]
    assert greetings == ["Hello None", "Goodbye None"]


def test_the_embedded_letters_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_task("programs/letters:sort-rotate").variant == "sort-rotate"


def test_what_a_task_refuses_is_the_users_mistake(folder):
    with pytest.raises(UserError, match="no split 'dev'"):
        load_task(str(folder)).load("dev")


@pytest.mark.parametrize(
    "name", ["no/such/task", "/no/such/task", "../nowhere", "./nowhere", "nowhere", "", "a b", "no-such-task"]
)
def test_a_task_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="task "):
        load_task(name)


def test_a_folder_without_a_task_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no task.py"):
        load_task(str(tmp_path))


def test_a_task_that_lacks_a_function_is_told_which(tmp_path):
    (tmp_path / "task.py").write_text("def load(split): ...\n")
    with pytest.raises(UserError, match="lacks build_program, metric"):
        load_task(str(tmp_path))


def test_a_module_whose_own_import_fails_says_so(tmp_path, monkeypatch):
    (tmp_path / "lonely_task_module.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing it failed: No module named 'a_package_that_is_not_there'"):
        load_task("lonely_task_module")


def test_functions_may_leave_out_what_they_do_not_need(tmp_path):
    (tmp_path / "task.py").write_text(
        "def build_program(): return 'program'\n"
        "def metric(example, prediction): return 1.0\n"
        "def load(split): return [f'{split}{i}' for i in range(9)]\n"
    )
    task = load_task(str(tmp_path))
    assert task.build_program() == "program"
    assert task.load("val", size=2) == ["val0", "val1"]
    with pytest.raises(UserError, match="build_program takes no variant"):
        load_task(f"{tmp_path}:loud").build_program()
