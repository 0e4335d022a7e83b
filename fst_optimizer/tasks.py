"""Tasks by name: `PATH_OR_MODULE[:VARIANT]` is a folder with `task.py`, or a module, that builds program and data."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError

if TYPE_CHECKING:
    import dspy

REQUIRED = ("build_program", "metric", "load")
SHIPPED = (Path(__file__).parent / "programs", Path(__file__).parents[1] / "programs")
"""Where the tasks are that come with the package: in it when it is installed, beside it in a checkout."""


@dataclass(frozen=True)
class Task:
    """A program with its data and metric."""

    name: str
    """As given on the command line."""
    module: ModuleType
    variant: str | None

    @property
    def metric(self) -> Callable[..., Any]:
        """The task's metric."""
        return self.module.metric  # type: ignore[no-any-return]

    def build_program(self) -> dspy.Module:
        """The seed program, without LMs of its own where the policy goes."""
        return self._call(self.module.build_program, variant=self.variant)

    def load(self, split: str, size: int | None = None, seed: int = 0) -> list[dspy.Example]:
        """Examples of `train`, `val` or `test`."""
        examples: list[dspy.Example] = self._call(
            self.module.load, split=split, size=size, seed=seed, variant=self.variant
        )
        return examples[:size]

    def config(self) -> FSTConfig | None:
        """The task's own settings, if it has any."""
        make = getattr(self.module, "config", None)
        return None if make is None else self._call(make, variant=self.variant)

    def model(self) -> str | None:
        """The task's own model, if it has one."""
        make = getattr(self.module, "model", None)
        return None if make is None else str(make())

    def reflection_lm(self) -> dspy.BaseLM | str | None:
        """The task's own reflection LM, or its name, if it has one."""
        return self._optional("reflection_lm")

    def instructions(self) -> dict[str, str] | None:
        """The right instruction of every predictor, if the task knows them."""
        return self._optional("instructions")  # type: ignore[no-any-return]

    def answers(self, example: dspy.Example) -> dict[str, dict[str, str]] | None:
        """The right outputs of every predictor on an example, `{predictor: {field: text}}`, if the task knows them."""
        return self._optional("answers", example=example)  # type: ignore[no-any-return]

    def probes(self) -> list[str] | None:
        """Variants of the same task on which following an instruction is measured, if it has any."""
        return self._optional("probes")  # type: ignore[no-any-return]

    def _optional(self, name: str, **arguments: Any) -> Any:
        """What a function says that a task may lack, and that need not take the variant; None without it."""
        function = getattr(self.module, name, None)
        return None if function is None else self._call(function, must=(), variant=self.variant, **arguments)

    def _call(self, function: Callable[..., Any], must: Sequence[str] = ("split", "variant"), **arguments: Any) -> Any:
        """With the arguments that the function takes. Those of `must` it has to take where they are given."""
        known = inspect.signature(function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            lacking = ", ".join(name for name in must if arguments.get(name) and name not in known)
            if lacking:
                text = f"{function.__name__} takes no {lacking}; see docs, 'Writing a task'"
                raise UserError(f"task {self.name!r}: {text}")
            arguments = {name: value for name, value in arguments.items() if name in known}
        try:
            return function(**arguments)
        except UserError:
            raise
        except (ValueError, KeyError) as error:
            raise UserError(f"task {self.name!r}: {error}") from error
        except SystemExit as error:
            raise UserError(_exits(self.name, function.__name__, error)) from error


def load_task(name: str) -> Task:
    """Find a task by folder or module name.

    A folder that does not exist here is looked for beside the installed package, so that `programs/letters` works
    from anywhere.

    Raises:
        UserError: nothing by that name, or it lacks one of the functions that a task has.
    """
    place, _, variant = name.partition(":")
    folder = _folder(place)
    try:
        module = _load_folder(folder) if folder else _import(place, name)
    except SystemExit as error:
        raise UserError(_exits(name, "importing it", error)) from error
    missing = [function for function in REQUIRED if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(f"task {name!r}: its task.py lacks {', '.join(missing)}; see docs, 'Writing a task'")
    return Task(name, module, variant or None)


def shipped_task(name: str) -> Task | None:
    """The task that comes with the package under this name, `programs/NAME[:VARIANT]`, or its folder; None for others.

    Nothing else is looked for, or imported: the name may come from a file that nobody trusts.
    """
    place, _, variant = name.partition(":")
    known = next((root for root in SHIPPED if root.is_dir()), SHIPPED[0])
    found = [path for path in known.glob("*/task.py") if place in (f"programs/{path.parent.name}", str(path.parent))]
    return Task(name, _load_folder(found[0].parent.resolve()), variant or None) if found else None


def run_name(task: str) -> str:
    """A run's name by its task: `programs/letters:sort-rotate` is `letters-sort-rotate`, `my.tasks.sums` is `sums`."""
    place, _, variant = task.partition(":")
    name = "-".join(part for part in (re.split(r"[/.]", place.rstrip("/"))[-1], variant) if part)
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "task"


def _folder(place: str) -> Path | None:
    here = Path(place)
    package = Path(__file__).parent
    for folder in (here, package / place, package.parent / place):
        if (folder / "task.py").is_file():
            return folder.resolve()
    if here.is_dir():
        raise UserError(f"task {place!r}: the folder has no task.py")
    if here.is_file():
        raise UserError(f"task {place!r} is a file: give its folder, {str(here.parent)!r}, with the task in task.py")
    return None


def _load_folder(folder: Path) -> ModuleType:
    """Import `task.py` as part of a package of its own, so that it can import its siblings relatively."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    package_name = f"fst_task_{folder.name.replace('-', '_')}_{digest}"
    if package_name not in sys.modules:
        package = ModuleType(package_name)
        package.__path__ = [str(folder)]
        sys.modules[package_name] = package
    return importlib.import_module(f"{package_name}.task")


def _exits(name: str, what: str, error: SystemExit) -> str:
    return (
        f"task {name!r}: {what} called sys.exit({error.code!r}), which would end this command as if its work were "
        'done; raise an error instead, and keep what a script does under `if __name__ == "__main__":`'
    )


def _import(place: str, name: str) -> ModuleType:
    module = place.strip("/").replace("/", ".")
    missing = f"task {name!r}: no folder with a task.py and no module by that name; try programs/letters"
    if place.startswith("/") or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(missing)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise UserError(f"task {name!r}: importing it failed: {error}") from error
        raise UserError(missing) from error
