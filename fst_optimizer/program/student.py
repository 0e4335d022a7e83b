"""What must be true of a student program, its policy and its teachers before a run starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.engines.sampling import check_options
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.policy.lm import trainable_policy
from fst_optimizer.program.lms import with_lms
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.types import Candidate

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.policy.policy import Policy


def checked_student(student: object) -> tuple[Policy, int]:
    """The one policy that the student's predictors use, and the version that they start from.

    Raises:
        UserError: no program, no predictors, a predictor without LM, no policy, or more than one.
    """
    predictors = check_program(student).named_predictors()
    lms = {name: predictor.lm or dspy.settings.lm for name, predictor in predictors}
    without = [name for name, lm in lms.items() if lm is None]
    if without:
        raise UserError(
            f"predictor(s) {', '.join(without)} have no LM: call student.set_lm(policy.lm), "
            "or dspy.configure(lm=policy.lm)"
        )
    policies = {id(policy): policy for lm in lms.values() if (policy := trainable_policy(lm))}
    if not policies:
        models = sorted({_model_of(lm) for lm in lms.values()})
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
    check_lms(student, policy, "student")
    version = max(_pinned(policy, lms.values()) or _served(policy, lms.values()))
    policy.check_served(version, "the student's LM")
    return policy, version


def check_program(student: object) -> dspy.Module:
    """The student, which is a program with predictors. Raises UserError for anything else."""
    if not isinstance(student, dspy.Module):
        raise UserError(f"student is {type(student).__name__}: give a dspy.Module")
    if not student.named_predictors():
        raise UserError(
            f"the student {type(student).__name__} has no dspy.Predict in it: there is nothing to learn. "
            "Make its predictors in __init__, as attributes"
        )
    _check_forward(student)
    return student


def _check_forward(student: dspy.Module) -> None:
    """Raises UserError where calling the student could run none of its code, or give a coroutine for an answer."""
    kind = type(student)
    if kind.__call__ is not dspy.Module.__call__:
        return
    # Of the instance itself, `hasattr` makes dspy warn.
    forward, aforward = (vars(student).get(name, getattr(kind, name, None)) for name in ("forward", "aforward"))
    if inspect.iscoroutinefunction(forward):
        raise UserError(f"the student's {kind.__name__}.forward is async: name it aforward, or define it without async")
    if forward is None and aforward is None:
        raise UserError(f"the student {kind.__name__} has no forward (or aforward): define it, with the inputs by name")


def _model_of(lm: object) -> str:
    """An LM's model by its name; of what is no LM, its class: a `Policy` has a whole network as its `model`."""
    model = getattr(lm, "model", None)
    return model if isinstance(model, str) else f"a {type(lm).__name__}, which is no LM"


def check_lms(program: dspy.Module, policy: Policy, what: str) -> None:
    """Raises UserError for a closed policy, and where a predictor's LM or its `dspy.Predict(...)` asks it in vain."""
    if policy.closed:
        raise UserError(f"{policy!r} is closed: make a new Policy, and call {what}.set_lm(policy.lm)")
    for name, predictor in program.named_predictors():
        lm = predictor.lm or dspy.settings.lm
        if trainable_policy(lm) is policy:
            check_options({**lm.kwargs, **predictor.config}, f"the {what}'s predictor {name!r}: ")


def _pinned(policy: Policy, lms: Iterable[Any]) -> set[int]:
    """The versions of the policy that LMs stay at."""
    return {lm.engine.version for lm in lms if trainable_policy(lm) is policy} - {None}


def _served(policy: Policy, lms: Iterable[Any]) -> set[int]:
    """The versions of the policy that LMs serve now."""
    return {lm.engine.serves for lm in lms if trainable_policy(lm) is policy}


@dataclass(frozen=True)
class Teacher:
    """Another program on the same policy, whose rollouts join the student's groups."""

    candidate: Candidate
    """Names the teacher in requests and rollouts."""
    program: dspy.Module
    version: int | None
    """The policy version that its calls are sampled from. None: the newest."""


def checked_teachers(teacher: object, policy: Policy) -> tuple[Teacher, ...]:
    """The programs given as `teacher`, one or several. Raises UserError for one that the policy cannot learn from."""
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
        pinned = _pinned(policy, lms)
        if len(pinned) > 1:
            raise UserError(f"the teacher's LMs are at policy versions {sorted(pinned)}: give all of them one")
        check_lms(program, policy, "teacher")
        version = next(iter(pinned), None)
        if version is not None:
            policy.check_served(version, "the teacher's LM", "teacher")
        candidate = Candidate(seed_texts(program), origin="teacher", id=f"teacher-{place}")
        found.append(Teacher(candidate, with_lms(program), version))
    return tuple(found)


def check_roles(names: Iterable[str], config: FSTConfig) -> None:
    """Raises UserError where `config.predictors` names an unknown one, or leaves the method nothing to change."""
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
