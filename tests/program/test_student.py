import dspy
import pytest
from dspy.utils.dummies import DummyLM

from fst_optimizer.errors import UserError
from fst_optimizer.policy.lm import trainable_policy
from fst_optimizer.program.student import attach_policy, checked_student, give_lm


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> middle")
        self.second = dspy.Predict("middle -> answer")


@pytest.fixture
def policy(scripted):
    return scripted(lambda prompt, request: "")


def with_lms(first, second):
    program = Two()
    program.first.lm, program.second.lm = first, second
    return program


def test_the_policy_is_found_on_the_predictors_or_in_the_context(policy):
    assert checked_student(with_lms(policy.lm, policy.lm)) == (policy, 0)
    assert checked_student(with_lms(policy.lm, DummyLM([]))) == (policy, 0)
    with dspy.context(lm=policy.lm):
        assert checked_student(Two()) == (policy, 0)


def test_a_copied_lm_still_counts_as_the_policy(policy):
    assert checked_student(with_lms(policy.lm.copy(temperature=0.5), policy.lm)) == (policy, 0)
    assert checked_student(with_lms(policy.lm, policy.lm).deepcopy()) == (policy, 0)


def test_a_pinned_version_is_where_the_run_starts(policy):
    first, second = policy.publish(), policy.publish()
    assert checked_student(with_lms(policy.lm, policy.lm)) == (policy, second)
    assert checked_student(with_lms(policy.lm_at(first), policy.lm_at(first))) == (policy, first)
    assert checked_student(with_lms(policy.lm_at(first), policy.lm)) == (policy, first)


def test_a_version_that_is_not_served_any_more_is_refused(policy):
    version = policy.publish()
    policy.publish()
    policy.retire_all_but({2})
    with pytest.raises(UserError, match=r"at policy version 1, .* call student.set_lm"):
        checked_student(with_lms(policy.lm_at(version), policy.lm_at(version)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda lm: "a program", "student is str: give a dspy.Module"),
        (lambda lm: dspy.Module(), "the student Module has no dspy.Predict in it"),
        (lambda lm: Two(), r"predictor\(s\) first, second have no LM: call student.set_lm"),
        (lambda lm: with_lms(lm, None), r"predictor\(s\) second have no LM"),
        (lambda lm: with_lms(DummyLM([]), DummyLM([])), r"none of the student's LMs is a policy \(dummy\)"),
    ],
)
def test_a_student_that_nothing_can_be_trained_in_is_refused(policy, make, named):
    with pytest.raises(UserError, match=named):
        checked_student(make(policy.lm))


def test_a_frozen_base_alone_is_no_policy(policy):
    with pytest.raises(UserError, match="is a policy"):
        checked_student(with_lms(policy.base_lm, policy.base_lm))


def test_two_policies_are_refused(policy, scripted):
    other = scripted(lambda prompt, request: "")
    with pytest.raises(UserError, match=r"the student uses 2 trainable policies .* call student.set_lm"[:40]):
        checked_student(with_lms(policy.lm, other.lm))


def test_attaching_copies_the_student_and_leaves_other_lms(policy):
    dummy = DummyLM([])
    student = with_lms(policy.lm, dummy)
    version = policy.publish()
    copy = attach_policy(student, policy, version)
    assert copy is not student
    assert copy.first.lm.engine.version == version
    assert copy.second.lm is dummy
    assert student.first.lm is policy.lm


def test_attaching_writes_the_contexts_lm_onto_the_predictors(policy):
    with dspy.context(lm=policy.lm):
        copy = attach_policy(Two(), policy)
    assert trainable_policy(copy.second.lm) is policy


def test_an_lm_is_given_to_those_without_one_and_not_to_others(policy):
    dummy = DummyLM([])
    program = give_lm(with_lms(None, dummy), policy.lm)
    assert (program.first.lm, program.second.lm) == (policy.lm, dummy)
