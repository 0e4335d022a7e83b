import dspy
import pytest
from dspy.utils.dummies import DummyLM

from fst_optimizer import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.program.student import check_roles, checked_student, checked_teachers
from helpers.toy import Program


class Awaited(Program):
    async def forward(self, question):
        return dspy.Prediction(answer=question)


class NoForward(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> answer")


class Network:
    """What a `Policy` is to `set_lm`: no LM, and its `model` prints over a page."""

    model = object()


class OwnCall(NoForward):
    def __call__(self, question):
        return self.first(question=question)


def with_lms(first, second):
    program = Program()
    program.first.lm, program.second.lm = first, second
    return program


def test_the_policy_is_found_on_the_predictors_or_in_the_context(policy):
    assert checked_student(with_lms(policy.lm, policy.lm)) == (policy, 0)
    assert checked_student(with_lms(policy.lm, DummyLM([]))) == (policy, 0)
    with dspy.context(lm=policy.lm):
        assert checked_student(Program()) == (policy, 0)


def test_a_copied_lm_still_counts_as_the_policy(policy):
    assert checked_student(with_lms(policy.lm.copy(temperature=0.5), policy.lm)) == (policy, 0)
    assert checked_student(with_lms(policy.lm, policy.lm).deepcopy()) == (policy, 0)


def test_a_pinned_version_is_where_the_run_starts(policy):
    first, second = policy.publish(), policy.publish()
    assert checked_student(with_lms(policy.lm, policy.lm)) == (policy, 0)
    assert checked_student(with_lms(policy.latest_lm, policy.lm)) == (policy, second)
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
        (lambda lm: dspy.Module(), "the student Module has no dspy.Predict in it: .* Make its predictors in __init__"),
        (lambda lm: Awaited(), "the student's Awaited.forward is async: name it aforward"),
        (lambda lm: NoForward(), r"the student NoForward has no forward \(or aforward\)"),
        (
            lambda lm: with_lms(Network(), Network()),
            r"is a policy \(a Network, which is no LM\): .*set_lm\(policy.lm\)",
        ),
        (lambda lm: Program(), r"predictor\(s\) first, second have no LM: call student.set_lm"),
        (lambda lm: with_lms(lm, None), r"predictor\(s\) second have no LM"),
        (lambda lm: with_lms(DummyLM([]), DummyLM([])), r"none of the student's LMs is a policy \(dummy\)"),
    ],
)
def test_a_student_that_nothing_can_be_trained_in_is_refused(policy, make, named):
    with pytest.raises(UserError, match=named):
        checked_student(make(policy.lm))


def test_what_answers_without_a_forward_of_its_own_is_a_program(policy):
    for program in (OwnCall(), dspy.Predict("question -> answer"), dspy.ReAct("question -> answer", tools=[])):
        program.set_lm(policy.lm)
        assert checked_student(program) == (policy, 0)


def test_a_frozen_base_alone_is_no_policy(policy):
    with pytest.raises(UserError, match="is a policy"):
        checked_student(with_lms(policy.base_lm, policy.base_lm))


def test_two_policies_are_refused(policy, scripted):
    other = scripted(lambda prompt, request: "")
    with pytest.raises(UserError, match=r"the student uses 2 trainable policies .* call student.set_lm"[:40]):
        checked_student(with_lms(policy.lm, other.lm))


# --- Teachers and roles ----------------------------------------------------------------------------------------------


def test_teachers_are_one_program_or_several_each_at_its_version(policy):
    version = policy.publish()
    first, second = checked_teachers([with_lms(policy.lm, None), with_lms(policy.lm_at(0), policy.lm_at(0))], policy)
    assert (first.version, second.version) == (None, 0)
    assert (first.candidate.id, second.candidate.origin) == ("teacher-0", "teacher")
    assert checked_teachers(with_lms(policy.lm_at(version), None), policy)[0].version == version
    assert checked_teachers(None, policy) == ()


def test_a_teachers_lm_from_the_context_is_written_onto_a_copy(policy):
    given = Program()
    with dspy.context(lm=policy.lm):
        (teacher,) = checked_teachers(given, policy)
    assert (given.first.lm, teacher.program.first.lm) == (None, policy.lm)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda policy: "a program", "teacher is str: give a dspy.Module, or a list of them"),
        (lambda policy: with_lms(DummyLM([]), DummyLM([])), r"none of the teacher's predictors \(Program\) uses"),
        (lambda policy: with_lms(policy.lm_at(1), policy.lm_at(0)), r"LMs are at policy versions \[0, 1\]"),
        (lambda policy: with_lms(policy.lm_at(7), None), "the teacher's LM is at policy version 7, which"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(policy, make, named):
    policy.publish()
    with pytest.raises(UserError, match=named):
        checked_teachers(make(policy), policy)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"predictors": {"frist": "train"}}, "predictors.frist: .* did you mean 'first'"),
        ({"predictors": {"first": "neither", "second": "neither"}}, "leaves method 'fst' nothing to change"),
        ({"method": "gepa", "predictors": {"first": "train", "second": "neither"}}, "first, second evolve"),
        ({"method": "rl", "predictors": {"first": "evolve", "second": "evolve"}}, "first, second train"),
    ],
)
def test_roles_that_no_predictor_has_or_that_leave_nothing_to_learn_are_refused(settings, named):
    check_roles(["first", "second"], FSTConfig())
    with pytest.raises(UserError, match=named):
        check_roles(["first", "second"], FSTConfig.from_dict(settings))
