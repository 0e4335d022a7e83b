"""Runs a generated program under bounds, and notes the values that it makes on the way.

Only source that `compose` wrote is run. Even so it sees the built-in functions listed here and no others, and counts
its steps: a program that takes too many, or makes a value that is too large, ends with `OutOfBounds`.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUILTINS = {
    function.__name__: function
    for function in (abs, chr, enumerate, len, max, min, ord, range, round, set, sorted, str, sum, zip)
}
MAX_STEPS = 400
"""Function calls and turns of loops."""
MAX_NUMBER = 100_000
MAX_CHARACTERS = 160
"""Of any value that is noted, as JSON."""


class OutOfBounds(Exception):
    """The program ran too long, or made a value too large to follow by hand."""


@dataclass(frozen=True)
class Run:
    """What a program did."""

    output: Any
    """What `main` returned."""
    noted: tuple[str, ...]
    """Every value that was assigned, appended or returned, in order, as JSON; not constants, and not indices."""
    steps: int


def run(code: str, arguments: Mapping[str, Any]) -> Run:
    """Calls the program's `main` with these arguments.

    Raises:
        OutOfBounds: It took too long or made too large a value.
    """
    noted: list[str] = []
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise OutOfBounds(f"more than {MAX_STEPS} steps")

    def note(value: Any) -> Any:
        noted.append(as_json(value))
        return value

    tree = ast.fix_missing_locations(_Watched().visit(ast.parse(code)))
    space: dict[str, Any] = {"__builtins__": BUILTINS, _TICK: tick, _NOTE: note}
    exec(compile(tree, "<program>", "exec"), space)
    output = space["main"](**json.loads(json.dumps(arguments)))
    return Run(output, tuple(noted), steps)


def as_json(value: Any) -> str:
    """A value as JSON on one line. Raises OutOfBounds for one that is too large."""
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise OutOfBounds(f"a number beyond {MAX_NUMBER}")
    text = json.dumps(value)
    if len(text) > MAX_CHARACTERS:
        raise OutOfBounds(f"a value of more than {MAX_CHARACTERS} characters")
    return text


_TICK, _NOTE = "tick_", "note_"
"""No generated name ends in an underscore."""
INDICES = {"i", "j"}
"""Names of places in a list or text: counting them up is no news."""


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _noted(value: ast.expr) -> ast.expr:
    """The expression with its value noted, or each value of `a, b`; a constant or `[]` tells nothing of the run."""
    if isinstance(value, ast.Tuple):
        value.elts = [_noted(part) for part in value.elts]
        return value
    empty = (isinstance(value, ast.List) and not value.elts) or (isinstance(value, ast.Dict) and not value.keys)
    return value if empty or isinstance(value, ast.Constant) else _call(_NOTE, value)


def _is_index(target: ast.expr) -> bool:
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    return all(isinstance(name, ast.Name) and name.id in INDICES for name in names)


class _Watched(ast.NodeTransformer):
    """Adds a tick to every function and loop, and a note to every assignment, append and return."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._ticking(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        return self._ticking(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._ticking(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if not _is_index(node.targets[0]):
            node.value = _noted(node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> list[ast.stmt]:
        if _is_index(node.target):
            return [node]
        target = ast.parse(ast.unparse(node.target), mode="eval").body
        return [node, ast.Expr(_call(_NOTE, target))]

    def visit_Return(self, node: ast.Return) -> ast.AST:
        node.value = _noted(node.value) if node.value else None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "append":
            call.args = [_noted(argument) for argument in call.args]
        return node

    def _ticking(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(_call(_TICK)))
        return node  # type: ignore[no-any-return]
