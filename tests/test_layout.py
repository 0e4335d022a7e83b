"""The layout of the tests: what is shared lies in helpers/, and no test module imports another."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported_words(source):
    """Every part of every dotted name that the source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            dotted = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (word for name in dotted for word in name.split("."))


def test_no_test_module_imports_another():
    modules = {path.stem for path in TESTS.rglob("*.py") if path.stem.startswith("test_") or path.stem == "conftest"}
    found = {path.name: modules.intersection(imported_words(path.read_text())) for path in TESTS.rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


def test_an_import_of_a_test_module_is_seen_however_it_is_written():
    for source in ("import test_optimizer", "from test_optimizer import x", "from tests import test_optimizer as t"):
        assert "test_optimizer" in set(imported_words(source))
