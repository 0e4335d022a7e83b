"""How copies of a program get their LMs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import dspy

from fst_optimizer.keys import keep_keys_of_lm
from fst_optimizer.policy.lm import takes_policy, trainable_policy
from fst_optimizer.program.texts import copy_program

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy


def keep_keys_of(*owners: object) -> None:
    """Keep secret what LMs, or the LMs of programs, were given as keys, headers and addresses."""
    for owner in owners:
        if isinstance(owner, dspy.Module):
            keep_keys_of(*(predictor.lm for predictor in owner.predictors()), *_lms_among(vars(owner).values()))
        elif isinstance(owner, dspy.BaseLM):
            keep_keys_of_lm(owner)
        elif isinstance(owner, list | tuple):
            keep_keys_of(*owner)


def _lms_among(values: Iterable[object]) -> list[object]:
    return [value for value in values if isinstance(value, dspy.BaseLM)]


def with_lms(program: dspy.Module) -> dspy.Module:
    """A copy that works in any context: an LM from `dspy.configure` is written onto the predictors."""
    copy = copy_program(program)
    for predictor in copy.predictors():
        predictor.lm = predictor.lm or dspy.settings.lm
    return copy


def attach_policy(student: dspy.Module, policy: Policy, version: int | None = None) -> dspy.Module:
    """A copy `with_lms`, the policy's predictors on `policy.lm` or at a version of it; other LMs and settings stay."""
    copy = with_lms(student)
    lm = policy.lm if version is None else policy.lm_at(version)
    for predictor in copy.predictors():
        if trainable_policy(predictor.lm) is policy:
            predictor.lm = _set_like(lm, predictor.lm)
    return copy


def give_lm(program: dspy.Module, lm: dspy.LM) -> dspy.Module:
    """Set `lm` on the predictors without one, or with a policy's; a predictor's own other LM stays. In place."""
    for predictor in program.predictors():
        if predictor.lm is None:
            predictor.lm = lm
        elif takes_policy(predictor.lm):
            predictor.lm = _set_like(lm, predictor.lm)
    return program


def _set_like(lm: dspy.LM, own: dspy.LM) -> dspy.LM:
    """`lm` with the settings that a predictor's own LM was given, as in `policy.lm.copy(temperature=0.5)`."""
    given = {name: value for name, value in own.kwargs.items() if value is not None}
    return lm.copy(**given) if given else lm


def without_unsaveable_lms(program: dspy.Module) -> dspy.Module:
    """A copy to save: other LMs than the policy's of which dspy can write no state are left out of it."""
    copy = copy_program(program)
    for predictor in copy.predictors():
        if predictor.lm is not None and not takes_policy(predictor.lm) and not _saveable(predictor.lm):
            predictor.lm = None
    return copy


def _saveable(lm: dspy.BaseLM) -> bool:
    try:
        return bool(json.dumps(lm.dump_state()) != "{}")
    except TypeError:  # an engine of the user's own
        return False
