"""The package as it is installed: light to import, and with its task and model inside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fst_optimizer

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "dspy", "gepa", "litellm", "numpy", "peft", "transformers", "trl", "vllm", "optuna", "matplotlib"}
SHORT = {
    "budget": {"max_cycles": 1},
    "fast": {"population": 2, "anchor_size": 4, "max_rollouts": 40, "max_proposals": 4, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2},
    "train": {"steps_per_cycle": 1},
    "eval": {"max_examples": 8, "kl_examples": 2},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def in_a_new_process(code: str, path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["fst_optimizer", "fst_optimizer.cli.main"])
def test_importing_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    loaded = in_a_new_process(f"import sys, {module}; print(*sys.modules)", ROOT, tmp_path).split()
    assert HEAVY.intersection(loaded) == set()


def test_every_public_name_is_there() -> None:
    assert [name for name in fst_optimizer.__all__ if getattr(fst_optimizer, name, None) is None] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Fst'"):
        _ = fst_optimizer.Fst  # type: ignore[attr-defined]


def test_the_version_is_said_once() -> None:
    assert fst_optimizer.__version__ == PROJECT["version"]


def test_constraints_pin_torch_first_and_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)


def test_every_direct_dependency_is_pinned() -> None:
    asked = [*PROJECT["dependencies"], *(d for name in ("lab", "tune", "dev", "docs") for d in extra(name))]
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.match(r"[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in asked}  # type: ignore[index]
    assert names - {"fst-optimizer"} <= pins


def extra(name: str) -> list[str]:
    return list(PROJECT["optional-dependencies"][name])


@pytest.mark.slow
def test_the_wheel_brings_the_letters_task_and_its_model_and_runs_the_readmes_example(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert [name for name in names if "__pycache__" in name or name.startswith(("tests", "docs"))] == []
    assert "fst_optimizer/tuning/space.json" in names
    model = installed / "fst_optimizer/programs/letters/model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in model.iterdir()
    }
    assert sum(path.stat().st_size for path in model.iterdir()) < 8 * 2**20
    code = (
        "from fst_optimizer.tasks import load_task; task = load_task('programs/letters'); "
        "print(task.model(), len(task.build_program().named_predictors()), len(task.load('val', 3)))"
    )
    place, predictors, examples = in_a_new_process(code, installed, tmp_path).splitlines()[-1].split()
    assert (Path(place), predictors, examples) == (model, "2", "3")
    (shown,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "own_program.py").write_text(shown)
    code = (
        f"import fst_optimizer, own_program; better = own_program.main({SHORT!r}); print(fst_optimizer.__file__, "
        "better.predictors()[0].lm.engine.policy.folder, better.detailed_results.result['steps'])"
    )
    package, folder, steps = in_a_new_process(code, installed, empty).splitlines()[-1].split()
    assert (Path(package).parent, Path(folder), steps) == (installed / "fst_optimizer", model, "1")
    assert [path.name for path in empty.iterdir() if path.suffix == ""] == ["runs"]
