import dspy
from dspy.utils.dummies import DummyLM

from fst_optimizer.policy.lm import trainable_policy
from fst_optimizer.program.lms import attach_policy, give_lm, without_unsaveable_lms
from helpers.toy import Program


def with_lms(first, second):
    program = Program()
    program.first.lm, program.second.lm = first, second
    return program


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
        copy = attach_policy(Program(), policy)
    assert trainable_policy(copy.second.lm) is policy


def test_an_lm_is_given_to_those_without_one_and_not_to_others(policy):
    dummy = DummyLM([])
    program = give_lm(with_lms(None, dummy), policy.lm)
    assert (program.first.lm, program.second.lm) == (policy.lm, dummy)


class Engine:
    def complete(self, request):
        raise NotImplementedError


def test_lms_that_dspy_cannot_save_are_left_out_of_the_copy_to_save(policy):
    known, custom = dspy.LM("openai/gpt-5-mini"), dspy.LM("hosted_vllm/own", engine=Engine(), cache=False)
    assert without_unsaveable_lms(with_lms(policy.lm, known)).second.lm is known
    copy = without_unsaveable_lms(with_lms(policy.lm, custom))
    assert (copy.first.lm, copy.second.lm) == (policy.lm, None)
