"""Code blocks of the README, the manual and the tasks' pages: Python is run on stand-ins, commands are parsed."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import dspy
import pytest
import typer

import fst_optimizer
from fst_optimizer import FST, FSTConfig, Policy, VLLMConfig
from fst_optimizer.cli.main import app
from fst_optimizer.config.overrides import assignments, settled
from helpers import toy
from helpers.fst import SMALL, fst

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "programs").glob("*/README.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def places(language: str) -> Iterator[str]:
    """PAGE#NUMBER of every block in a language."""
    for page in PAGES:
        yield from (f"{page.relative_to(ROOT).as_posix()}#{n}" for n in range(len(blocks(page, language))))


def text_at(place: str, language: str) -> str:
    page, _, number = place.partition("#")
    return blocks(ROOT / page, language)[int(number)]


# -- Python -----------------------------------------------------------------------------------------------------------

RUN_ELSEWHERE = {
    "README.md#0": "is examples/own_program.py, word for word: test_docs.py compares and runs it",
    "docs/programs.md#2": "takes minutes; examples/dspy_optimizers.py does it in few steps: test_docs.py runs it",
    "docs/tuning.md#0": "takes minutes; examples/tune_own_program.py does it in two trials: test_docs.py runs it",
}
"""Blocks that are not run here, and why."""


class ShortFST(FST):
    """FST with its settings cut down to one cycle of one step, unless the block gives its own."""

    def __init__(self, metric: Any, **options: Any) -> None:
        super().__init__(metric, **{"config": toy.SHORT, **options})


def checked_policy(*arguments: Any, **options: Any) -> None:
    """Refuses what `Policy` has no parameter for; loads nothing."""
    inspect.signature(Policy.__init__).bind(None, *arguments, **options)


class Tidied(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.answer, self.tidy = dspy.Predict("question -> draft"), dspy.Predict("draft -> answer")


@pytest.fixture
def names(scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks take as given: the program, data and policy of the toy."""
    monkeypatch.chdir(tmp_path)
    policy = scripted(toy.answer)
    return {
        "FST": ShortFST,
        "Policy": lambda *arguments, **options: policy,
        "VLLMConfig": VLLMConfig,
        "TrimAndOrder": toy.Program,
        "dspy": dspy,
        "fst_optimizer": fst_optimizer,
        "metric": toy.metric,
        "model": "some/model",
        "policy": policy,
        "program": Tidied(),
        "train": toy.TRAIN,
        "val": toy.VAL,
    }


@pytest.mark.parametrize("place", places("python"))
def test_a_block_of_python_runs(place: str, names: dict[str, Any]) -> None:
    code = text_at(place, "python")
    if place in RUN_ELSEWHERE:
        pytest.skip(RUN_ELSEWHERE[place])
    if place.startswith("docs/vllm.md"):
        names["Policy"] = checked_policy  # it would start a server
    if place == "docs/getting-started.md#1":  # loads what the block before it has left
        exec(compile(text_at("docs/getting-started.md#0", "python"), place, "exec"), names)
        code = code.replace("runs/TrimAndOrder-...", str(names["better"].detailed_results.run_dir))
        code = code.replace("TrimAndOrder())", f"TrimAndOrder(), model={names['policy'].source!r})")  # no built-in one
    exec(compile(code, place, "exec"), names)


def test_the_blocks_that_are_not_run_exist() -> None:
    assert set(RUN_ELSEWHERE) <= set(places("python"))


def test_a_task_has_the_functions_that_the_page_shows() -> None:
    shown: dict[str, Any] = {}
    exec(text_at("docs/writing-a-task.md#0", "python"), shown)
    from fst_optimizer.tasks import REQUIRED, Task, load_task

    task = load_task("programs/letters").module
    functions = {name: one for name, one in shown.items() if inspect.isfunction(one)}
    assert set(REQUIRED) <= set(functions)
    assert all(hasattr(Task, name) for name in functions)
    functions.pop("reflection_lm")  # the letters task has none
    for name, function in functions.items():
        assert list(inspect.signature(getattr(task, name)).parameters) == list(inspect.signature(function).parameters)


# -- commands ---------------------------------------------------------------------------------------------------------

NOT_OURS = {
    "make": "test_docs.py looks its targets up",
    "pip": "installs",
    "vllm": "starts a server, with vLLM's own options",
    "export": "sets an environment variable",
    "optuna-dashboard": "a package of its own",
}
"""Commands that are not parsed here, and why."""


def commands(place: str) -> Iterator[list[str]]:
    """The words of every command in a block, without environment variables before it and comments behind it."""
    for line in text_at(place, "bash").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("place", places("bash"))
def test_a_block_of_commands_parses(place: str) -> None:
    for words in commands(place):
        name = words[0].removeprefix(".venv/bin/")
        if name == "fst":
            check_fst(words[1:])
        elif name == "python":
            check_python(words[1:])
        else:
            assert name in NOT_OURS, words


def check_fst(words: list[str]) -> None:
    """The real parser takes the words, and `--set` names settings that exist and may have these values."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, [word.replace("METHOD", "rl") for word in words])
    settled(FSTConfig(), assignments(context.params.get("sets") or ()))


def check_python(words: list[str]) -> None:
    """The script or test that is named is there."""
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]] if words[1] != "pytest" else words[2:]
    assert (ROOT / words[0]).exists(), words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compile TASK --rundir x", "No such option"),
        ("lab compare TASK", "Missing parameter"),
        ("compile TASK --run-dir x --set train.lrr=1", "train.lrr"),
    ],
)
def test_a_wrong_option_or_setting_would_be_seen(command: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        check_fst(command.split())


@pytest.mark.slow
def test_the_readmes_first_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places_there = [place for place in places("bash") if place.startswith("README.md")]
    shown = [words[1:] for place in places_there for words in commands(place) if words[0] == "fst"]
    compiling, evaluating = shown[:2]
    for words in ([*compiling, *SMALL], evaluating):
        said = fst(*words)
        assert said.exit_code == 0, said.output
    assert (compiling[0], evaluating[0]) == ("compile", "eval")
