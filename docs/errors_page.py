"""Writes the list of errors in `troubleshooting.md`: every error that the package can raise, as its code has it.

    python docs/errors_page.py            writes the page's list anew
    python docs/errors_page.py --check    exit code 1 where the page is not as the code is

A value that is only known when the error is raised is shown as `…`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fst_optimizer"
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- errors: begin -->", "<!-- errors: end -->"
UNKNOWN = "…"

PARTS = {
    "Settings": ("config",),
    "The optimizer, the student and the data": (
        "optimizer",
        "program",
        "data",
        "schedule",
        "cycle",
        "phases",
        "evolve",
    ),
    "Rollouts and the metric": ("rollout", "dry_run", "run/evaluate", "store/meter"),
    "The policy and its model": ("policy", "model"),
    "The slow step": ("train",),
    "Distillation": ("distill", "task_distill"),
    "Engines": ("engines",),
    "Run directories": ("store", "run"),
    "Tasks": ("tasks", "task_run", "task_kit", "sandbox"),
    "Finished runs": ("finished",),
    "dspy's own optimizers on a policy": ("dspy_jobs",),
    "Comparisons and studies": ("lab", "tuning"),
    "Commands": ("cli",),
    "Everything else": ("",),
}
"""Heading -> where in the package its errors are raised, the first that fits."""


@dataclass(frozen=True, order=True)
class Raised:
    """An error that the code can raise."""

    name: str
    """Of its class."""
    text: str


def error_classes() -> dict[str, ast.ClassDef]:
    """The package's own exceptions, by name."""
    found: dict[str, ast.ClassDef] = {}
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    grew = True
    while grew:
        grew = False
        for tree in trees:
            for node in ast.walk(tree):
                if not isinstance(node, ast.ClassDef) or node.name in found:
                    continue
                bases = {ast.unparse(base) for base in node.bases}
                if node.name == "FSTError" or bases & set(found):
                    found[node.name] = node
                    grew = True
    return found


def raised(path: Path, classes: set[str]) -> Iterator[Raised]:
    """The errors that one module makes, in the order of its lines; those whose text is made elsewhere are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes and node.args:
            text = " ".join(text_of(node.args[0]).split())
            if re.search(r"\w{3}", text):
                yield Raised(node.func.id, text)


def text_of(node: ast.expr) -> str:
    """The text of an expression, as far as the code says it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} / {text_of(node.orelse)}"
    return UNKNOWN


def sections() -> dict[str, list[Raised]]:
    """Heading -> its errors, by class and text."""
    classes = set(error_classes())
    found: dict[str, set[Raised]] = {title: set() for title in PARTS}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        title = next(
            title
            for title, parts in PARTS.items()
            if any(not part or place == part or place.startswith(f"{part}/") for part in parts)
        )
        found[title].update(raised(path, classes))
    return {title: sorted(errors) for title, errors in found.items() if errors}


def listed() -> str:
    """The list as Markdown."""
    lines = []
    for title, errors in sections().items():
        lines += ["", f"### {title}", ""]
        lines += [f"- **{error.name}** {escaped(error.text)}" for error in errors]
    return "\n".join(lines).strip() + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{listed()}\n{END}{after}"


if __name__ == "__main__":
    wanted = page()
    if "--check" in sys.argv[1:]:
        sys.exit(None if PAGE.read_text() == wanted else f"{PAGE.name} is not as the code is: run python {sys.argv[0]}")
    PAGE.write_text(wanted)
