"""Imports of the package go one way: each layer imports only what is below it, and no two modules import each other.

An import inside a function counts; only what stands under `if TYPE_CHECKING` does not. What lies below and needs a
value from above is handed it. And no module reads a private attribute that another one defines.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fst_optimizer"
LEVELS = (
    "keys",
    "children errors failpoints finding sandbox stats task_kit text",
    "logs",
    *("types", "data", "store", "config", "progress", "model", "engines", "train", "policy", "program", "rollout"),
    *("dspy_jobs", "evolve", "run", "schedule", "planned", "collect", "stream", "phases", "cycle", "ends", "distill"),
    *("parts", "dry_run", "optimizer"),
    *("tasks", "finished", "task_run", "task_distill", "task_check"),
    *("testing", "lab", "tuning", "cli"),
)
"""From the lowest to the highest. What shares a line does not import each other."""
OTHERS_PRIVATE = {
    ("rollout/collector.py", "_instances"): "tqdm's list of bars, which dspy.Parallel clears",
    ("optimizer.py", "_compiled"): "dspy's mark of a compiled program, read by dspy.BetterTogether",
}
"""Private attributes of libraries that have no public way, and what they are."""


def modules_of(package):
    """Dotted name -> syntax tree of every module of a package; a package's own name is that of its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def run_nodes(tree):
    """Every node but those under `if TYPE_CHECKING`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def imports_of(name, tree, modules):
    """(line, module of the package) of every import in a module."""
    own = name.split(".")
    package = own if any(other.startswith(f"{name}.") for other in modules) else own[:-1]
    for node in run_nodes(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, target) for target in dict.fromkeys(targets) if target in modules)


def against_the_order(package, levels):
    """Imports of a higher layer, or of one on the same line of the table."""
    level = {layer: number for number, line in enumerate(levels) for layer in line.split()}
    modules, found = modules_of(package), []
    for name, tree in modules.items():
        own = layer_of(name)
        if not own:
            continue  # the package itself gathers its public names
        for line, target in imports_of(name, tree, modules):
            other = layer_of(target)
            if other != own and level.get(other, len(levels)) >= level[own]:
                found.append(f"{name}:{line} imports {target}")
    return found


def layer_of(name):
    return name.split(".")[1] if "." in name else ""


def circles(package):
    """Sets of modules that reach each other by imports."""
    modules = modules_of(package)
    imports = {name: {target for _, target in imports_of(name, tree, modules)} for name, tree in modules.items()}
    reached = {name: targets - {name} for name, targets in imports.items()}
    for middle in modules:
        for name in modules:
            if middle in reached[name]:
                reached[name] = reached[name] | reached[middle]
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in modules}
    return sorted(sorted(circle) for circle in found if circle)


def private_reads(package):
    """Private attributes, functions and modules that are used where they are not defined."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree, where = ast.parse(path.read_text()), path.relative_to(package).as_posix()
        own = set(defined_in(tree))
        for line, name in private_names(tree):
            if name not in own:
                found.append(f"{where}:{line} reads {name}")
    return found


def private_names(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [part for alias in node.names for part in (*(node.module or "").split("."), alias.name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        yield from ((node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__"))


def defined_in(tree):
    """Names that a module defines: functions, classes, variables, fields and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "cls"):
            yield node.attr


# -- the package ----------------------------------------------------------------------------------------------------


def test_every_layer_of_the_package_is_in_the_table():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == {layer for line in LEVELS for layer in line.split()}


def test_imports_go_down():
    assert against_the_order(PACKAGE, LEVELS) == []


def test_no_modules_import_each_other():
    assert circles(PACKAGE) == []


def test_nobody_reads_what_is_private_to_others():
    allowed = {f"{where} reads {name}" for where, name in OTHERS_PRIVATE}
    assert [one for one in private_reads(PACKAGE) if re.sub(r":\d+", "", one) not in allowed] == []


# -- that it would be seen ------------------------------------------------------------------------------------------

GOOD = {
    "__init__.py": "from pack.top import run",
    "low.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.top import run\n",
    "mid/__init__.py": "",
    "mid/one.py": "from pack import low\nclass One:\n    def __init__(self):\n        self._x = 1\n",
    "mid/two.py": "from .one import One\n",
    "top.py": "import pack.mid.two\nfrom pack.low import x\n",
}
TABLE = ("low", "mid", "top")


@pytest.fixture
def package(tmp_path):
    def write(**changed):
        for name, text in {**GOOD, **changed}.items():
            path = tmp_path / "pack" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "pack"

    return write


def test_a_right_tree_passes(package):
    tree = package()
    assert against_the_order(tree, TABLE) == circles(tree) == private_reads(tree) == []


@pytest.mark.parametrize(
    "turned",
    [
        "from pack.top import run",
        "import pack.top",
        "from pack import top",
        "from . import top",
        "from .top import run",
        "def later():\n    from pack.top import run",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from pack.top import run",
        "from pack.mid import one",
    ],
)
def test_an_import_that_is_turned_round_is_found(package, turned):
    (found,) = against_the_order(package(**{"low.py": turned}), TABLE)
    assert found.startswith("pack.low:") and "imports pack." in found


def test_a_circle_inside_a_layer_is_found(package):
    tree = package(**{"mid/one.py": "def later():\n    from .two import One"})
    assert against_the_order(tree, TABLE) == []
    assert circles(tree) == [["pack.mid.one", "pack.mid.two"]]


@pytest.mark.parametrize(
    "text",
    [
        "def f(one): return one._x",
        "def f(one): return getattr(one, '_x')",
        "from pack.mid.one import _x",
        "from library._heart import beat",
    ],
)
def test_a_private_attribute_of_others_is_found(package, text):
    (found,) = private_reads(package(**{"top.py": text}))
    assert found in ("top.py:1 reads _x", "top.py:1 reads _heart")
