"""The student program and its policy: what must be true of them, and how copies get their LMs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dspy

from fst_optimizer.engines.recorder import RecordingEngine
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.policy.lm import trainable_policy
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.types import Candidate

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.policy.policy import Policy


def checked_student(student: object) -> tuple[Policy, int]:
    """The one policy that the student's predictors use, and the version that they start from.

    Raises:
        UserError: no program, no predictors, a predictor without LM, no policy, or more than one.
    """
    if not isinstance(student, dspy.Module):
        raise UserError(f"student is {type(student).__name__}: give a dspy.Module")
    predictors = student.named_predictors()
    if not predictors:
        raise UserError(f"the student {type(student).__name__} has no dspy.Predict in it: there is nothing to learn")
    lms = {name: predictor.lm or dspy.settings.lm for name, predictor in predictors}
    without = [name for name, lm in lms.items() if lm is None]
    if without:
        raise UserError(
            f"predictor(s) {', '.join(without)} have no LM: call student.set_lm(policy.lm), "
            "or dspy.configure(lm=policy.lm)"
        )
    policies = {id(policy): policy for lm in lms.values() if (policy := trainable_policy(lm))}
    if not policies:
        models = sorted({str(getattr(lm, "model", lm)) for lm in lms.values()})
        raise UserError(
            f"none of the student's LMs is a policy ({', '.join(models)}): make one with "
            "fst_optimizer.Policy(model) and call student.set_lm(policy.lm)"
        )
    if len(policies) > 1:
        raise UserError(
            f"the student uses {len(policies)} trainable policies ({', '.join(map(repr, policies.values()))}); "
            "one run trains one. Call student.set_lm(policy.lm)"
        )
    (policy,) = policies.values()
    return policy, _start_version(policy, list(lms.values()))


def _start_version(policy: Policy, lms: list[object]) -> int:
    pinned = set()
    for lm in lms:
        engine = getattr(lm, "engine", None)
        if isinstance(engine, RecordingEngine) and engine.trainable and engine.version is not None:
            pinned.add(engine.version)
    version = max(pinned, default=policy.version)
    if version not in policy.engine.versions():
        raise UserError(
            f"the student's LM is at policy version {version}, which {policy!r} does not serve any more: "
            "call student.set_lm(policy.lm)"
        )
    return version


@dataclass(frozen=True)
class Teacher:
    """Another program on the same policy, whose rollouts join the student's groups."""

    candidate: Candidate
    """Names the teacher in requests and rollouts."""
    program: dspy.Module
    version: int | None
    """The policy version that its calls are sampled from. None: the newest."""


def checked_teachers(teacher: object, policy: Policy) -> tuple[Teacher, ...]:
    """The programs given as `teacher`, one or several.

    Raises:
        UserError: one is no program, or none of its calls would be sampled from the student's policy.
    """
    given = () if teacher is None else tuple(teacher) if isinstance(teacher, list | tuple) else (teacher,)
    found = []
    for place, program in enumerate(given):
        if not isinstance(program, dspy.Module):
            raise UserError(f"teacher is {type(program).__name__}: give a dspy.Module, or a list of them")
        lms = [predictor.lm or dspy.settings.lm for predictor in program.predictors()]
        if not any(trainable_policy(lm) is policy for lm in lms):
            raise UserError(
                f"none of the teacher's predictors ({type(program).__name__}) uses the student's policy, and calls of "
                "other models are not trained on: set_lm(policy.lm) or set_lm(policy.lm_at(version)) on the teacher, "
                "or leave teacher None"
            )
        pinned = {lm.engine.version for lm in lms if trainable_policy(lm) is policy} - {None}
        if len(pinned) > 1:
            raise UserError(f"the teacher's LMs are at policy versions {sorted(pinned)}: give all of them one")
        version = next(iter(pinned), None)
        if version is not None and version not in policy.engine.versions():
            raise UserError(
                f"the teacher's LM is at policy version {version}, which {policy!r} does not serve any more"
            )
        candidate = Candidate(seed_texts(program), origin="teacher", id=f"teacher-{place}")
        found.append(Teacher(candidate, _with_lms(program), version))
    return tuple(found)


def _with_lms(program: dspy.Module) -> dspy.Module:
    """A copy that works in any context: an LM from `dspy.configure` is written onto the predictors."""
    copy = apply_texts(program, {})
    for _, predictor in copy.named_predictors():
        predictor.lm = predictor.lm or dspy.settings.lm
    return copy


def check_roles(names: Iterable[str], config: FSTConfig) -> None:
    """Every predictor that `config.predictors` names is there, and something is left to learn.

    Raises:
        UserError: one is not, or the method has nothing to change.
    """
    names = list(names)
    for name in config.predictors:
        if name not in names:
            raise UserError(f"predictors.{name}: the student has no such predictor; {did_you_mean(name, names)}")
    evolves, trains = any(map(config.evolves, names)), any(map(config.trains, names))
    if (config.method == "gepa" and not evolves) or (config.method == "rl" and not trains) or not (evolves or trains):
        raise UserError(
            f"predictors leaves method {config.method!r} nothing to change: let one of {', '.join(names)} "
            f"{'evolve' if config.method == 'gepa' else 'train'}"
        )


def give_lm(program: dspy.Module, lm: dspy.LM) -> dspy.Module:
    """Set `lm` on the predictors without one, or with a policy's; a predictor's own other LM stays. In place."""
    for _, predictor in program.named_predictors():
        if predictor.lm is None or trainable_policy(predictor.lm):
            predictor.lm = lm
    return program


def without_unsaveable_lms(program: dspy.Module) -> dspy.Module:
    """A copy to save: other LMs than the policy's of which dspy can write no state are left out of it."""
    copy = apply_texts(program, {})
    for _, predictor in copy.named_predictors():
        if predictor.lm is not None and not trainable_policy(predictor.lm) and not _saveable(predictor.lm):
            predictor.lm = None
    return copy


def _saveable(lm: dspy.BaseLM) -> bool:
    try:
        return bool(json.dumps(lm.dump_state()) != "{}")
    except TypeError:  # an engine of the user's own
        return False


def attach_policy(student: dspy.Module, policy: Policy, version: int | None = None) -> dspy.Module:
    """A copy whose predictors on the policy use `policy.lm`, or its fixed `version`; other LMs stay.

    An LM from `dspy.configure` is written onto the predictors too, so that the copy works in any context.
    """
    copy = apply_texts(student, {})
    lm = policy.lm if version is None else policy.lm_at(version)
    for _, predictor in copy.named_predictors():
        own = predictor.lm or dspy.settings.lm
        predictor.lm = lm if trainable_policy(own) is policy else own
    return copy
