"""The texts of a program: read from it, and written into a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.text import shown, unicode_only
from fst_optimizer.types import Texts

if TYPE_CHECKING:
    import dspy


def seed_texts(program: dspy.Module) -> dict[str, str]:
    """Component name -> instruction, for every predictor of the program."""
    return {name: predictor.signature.instructions for name, predictor in program.named_predictors()}


def apply_texts(program: dspy.Module, texts: Texts) -> dspy.Module:
    """A copy of the program with these instructions; demos stay, LMs are shared, the original is not touched.

    Raises UserError for a text whose component the program does not have, and for a program that cannot be copied.
    """
    fresh = copy_program(program)
    predictors = dict(fresh.named_predictors())
    for name, text in texts.items():
        if name not in predictors:
            raise UserError(f"the program has no predictor {name!r}; {did_you_mean(name, predictors)}")
        predictors[name].signature = predictors[name].signature.with_instructions(text)
    return fresh


def check_texts(program: dspy.Module, texts: Mapping[str, object], where: str) -> dict[str, str]:
    """Instructions that `where` gives for a program's predictors, each of them a text that can be one.

    Raises:
        UserError: names the predictor that the program does not have, or whose instruction is no text.
    """
    known = seed_texts(program)
    if not texts:
        raise UserError(f"{where} is empty: give an instruction for one of {', '.join(known)}")
    for name, text in texts.items():
        if name not in known:
            raise UserError(f"{where} names {name!r}: the program has no such predictor; {did_you_mean(name, known)}")
        if not isinstance(text, str) or not text.strip() or unicode_only(text) != text:
            raise UserError(f"{where}: the instruction of {name} is {shown(text)}: give a text")
    return {name: str(text) for name, text in texts.items()}


def copy_program(program: dspy.Module) -> dspy.Module:
    """A deep copy that shares the LMs, and whatever else cannot be copied (locks, clients).

    `Module.deepcopy` copies LMs, engine included, and shares a whole list of predictors when one attribute in it
    cannot be copied: setting an instruction on the copy would then change the original.

    Raises UserError for a program that cannot be copied even so.
    """
    from dspy import BaseLM

    shared = {id(lm): lm for _, lm in program.named_sub_modules(type_=BaseLM)}
    try:
        return copy.deepcopy(program, dict(shared))
    except Exception:
        uncopyable = {id(value): value for value in _leaves(program) if not _copies(value, shared)}
    try:
        return copy.deepcopy(program, shared | uncopyable)
    except Exception as error:
        raise UserError(f"the student {type(program).__name__} cannot be copied: {error}") from error


def _leaves(program: dspy.Module) -> Iterator[Any]:
    """Every attribute of every module in the program that is neither a module nor a container."""
    import dspy

    pending = [value for _, module in program.named_sub_modules() for value in vars(module).values()]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, dspy.Module) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set):
            pending.extend(value)
        else:
            yield value


def _copies(value: Any, shared: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:
        return False
    return True
