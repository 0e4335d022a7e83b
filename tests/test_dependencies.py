"""What the package imports, it declares."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_EXTRA = {"programs", "fst_optimizer"}
BROUGHT_BY_USERS = {"vllm", "bitsandbytes", "IPython", "starlette"}
"""Imported only where the user has installed it: a server's own process, a kind of quantization."""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.match(r"[\w.-]+", entry)[0]) for entries in lists for entry in entries}


def imported():
    """Top-level module -> a file that imports it, for every import of another's package."""
    found = {}
    for folder in ("fst_optimizer", "programs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in names:
                    found.setdefault(name.partition(".")[0], path.relative_to(ROOT))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | WITHOUT_EXTRA}


def test_every_import_is_declared():
    distributions, known = packages_distributions(), declared()
    missing = {
        name: str(path)
        for name, path in imported().items()
        if name not in BROUGHT_BY_USERS and not {normal(one) for one in distributions.get(name, [name])} & known
    }
    assert not missing
