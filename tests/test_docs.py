"""What the README, the manual and the examples say is run or looked up."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
import typer
import yaml
from dspy.lm15 import Message, Response, TextPart, Usage

from fst_optimizer.cli.main import app
from fst_optimizer.testing import chat_answer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_OPTIMIZERS = ROOT / "examples" / "dspy_optimizers.py"
TUNING = ROOT / "examples" / "tune_own_program.py"
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {OTHER_OPTIMIZERS, TUNING})
GENERATED = {"results.md"}
SHORT = {
    "budget": {"max_cycles": 1},
    "fast": {"population": 2, "anchor_size": 4, "max_rollouts": 40, "max_proposals": 4, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2},
    "train": {"steps_per_cycle": 1},
    "eval": {"max_examples": 8, "kl_examples": 2},
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert blocks(ROOT / "README.md", "python") == [(ROOT / "examples" / "own_program.py").read_text()]


class Says:
    """The engine of an LM that answers every prompt with one text: what stands in for an API in the examples."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.calls = 0

    def complete(self, request: Any) -> Response:
        self.calls += 1
        message = Message.assistant([TextPart(self.text)])
        usage = Usage(input_tokens=10, output_tokens=5, total_tokens=15)
        return Response(id=None, model="said", message=message, finish_reason="stop", usage=usage)

    def __deepcopy__(self, memo: dict[int, object]) -> Says:
        return self


STAND_INS = {
    "frozen_lm": ("frozen", chat_answer(draft="b a c")),
    "llm_judge": ("judge_lm", chat_answer(score="0.5", advice="Sort the letters.")),
    "own_reflection_lm": ("reflection_lm", "```\nDrop the last letter.\n```"),
}
"""Example -> the argument that takes its API model, and what stands in for it says."""


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=page_id)
def test_an_example_runs(path: Path, in_an_empty_folder: Path) -> None:
    arguments, engine = {}, None
    if path.stem in STAND_INS:
        name, text = STAND_INS[path.stem]
        engine = Says(text)
        arguments[name] = dspy.LM("openai/gpt-5-mini", engine=engine, cache=False, num_retries=0)
    program = runpy.run_path(str(path))["main"](SHORT, **arguments)
    assert engine is None or engine.calls
    result = program.detailed_results
    assert (result.run_dir / "result.json").is_file()
    assert result.result["cycles"] == 1
    assert result.result["steps"] == 1
    assert result.result["rollouts"]["slow"] == 8
    assert result.result["val_score_after"] >= result.result["val_score_before"]
    lines = (result.run_dir / "rollouts" / "cycle-000000.jsonl").read_text().splitlines()
    assert {json.loads(line)["outcome"] for line in lines} <= {"ok", "parse_error", "truncated"}


@pytest.mark.slow
def test_dspys_own_optimizers_run_on_the_policy(in_an_empty_folder: Path) -> None:
    better = runpy.run_path(str(OTHER_OPTIMIZERS))["main"](steps=1, size=16)
    assert {entry["strategy"] for entry in better.candidate_programs} == {"", "f", "f -> g"}
    assert better.predictors()[0].lm.engine.policy.version > 0


@pytest.mark.slow
def test_the_settings_of_a_program_are_searched_for(in_an_empty_folder: Path) -> None:
    config = {**SHORT, "budget": {"max_rollouts": 24}}
    found, better = runpy.run_path(str(TUNING))["main"](config, trials=2)
    assert found.folder == Path("runs/tune-TrimAndOrder-0") and (found.folder / "best.json").is_file()
    assert len(found.summary["trials"]) == 2
    # The same settings, data and seed give the same run again.
    assert better.detailed_results.result["val_score_after"] == found.best_score


@pytest.mark.slow
def test_the_notebook_runs(in_an_empty_folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    space: dict[str, Any] = {}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        code = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            code = f"config, run_dir = {SHORT!r}, {str(in_an_empty_folder / 'run')!r}"
        exec(compile(code, f"cell {number}", "exec"), space)
        assert not cell["outputs"]
    assert space["result"]["steps"] == 1
    assert len(space["curve"]) >= 2


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    inside = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_the_manual_does_not_link_out_of_its_folder() -> None:
    out = {page.name: re.findall(r"\]\((\.\./[^)]*)\)", page.read_text()) for page in (ROOT / "docs").glob("*.md")}
    assert {name: links for name, links in out.items() if links} == {}


def test_the_names_in_the_readme_tree_exist() -> None:
    (tree,) = [block for block in blocks(ROOT / "README.md", "text") if "types.py" in block]
    names = list(tree_paths(tree))
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


def tree_paths(tree: str) -> Iterator[str]:
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        yield name if name == folder else folder + name


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = {page for entry in config["nav"] for page in entry.values()}
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert listed - GENERATED == there - GENERATED
    assert listed <= there


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    code = " ".join(re.findall(r"`[^`\n]+`", text)) + " ".join(blocks(page, "bash"))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", code)) <= targets
    command = typer.main.get_command(app)
    for words in re.findall(r"\bfst ((?:lab )?[a-z]+)", code):
        found = command
        for word in words.split():
            found = found.commands[word]  # type: ignore[attr-defined]
