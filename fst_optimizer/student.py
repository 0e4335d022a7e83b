"""The student program and its policy: what must be true of them, and how copies get their LMs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dspy

from fst_optimizer.engines.lm import trainable_policy
from fst_optimizer.engines.recorder import RecordingEngine
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.bridge import apply_texts

if TYPE_CHECKING:
    from fst_optimizer.policy import Policy


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


def give_lm(program: dspy.Module, lm: dspy.LM) -> dspy.Module:
    """Set `lm` on the predictors without one, or with a policy's; a predictor's own other LM stays. In place."""
    for _, predictor in program.named_predictors():
        if predictor.lm is None or trainable_policy(predictor.lm):
            predictor.lm = lm
    return program


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
