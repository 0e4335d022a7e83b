"""Which policy version the student, the compiled program and the policy's LMs serve before, while and after a run."""

import gc

import pytest

from fst_optimizer.errors import MetricError, UserError
from fst_optimizer.policy.policy import Policy
from fst_optimizer.store.files import read_json
from fst_optimizer.testing import move_adapter
from helpers.toy import SHORT, TRAIN, VAL, metric, optimizer, said, student_of


def learned(prompt, request):
    """Greedy decoding is right from the first trained version on; what is sampled in training is right by chance."""
    return said(request.version > 0 if request.temperature == 0 else request.seed % 2)


@pytest.fixture
def policy(scripted):
    return scripted(learned)


def compile_(run_dir, program, *, student_follows=False, **options):
    settings = SHORT | {"method": "rl"}
    made = optimizer(run_dir, settings=settings, **options)
    return made.compile(program, trainset=TRAIN, valset=VAL, student_follows=student_follows)


def score(program):
    return sum(metric(one, program(**one.inputs())).score for one in VAL) / len(VAL)


def start_of(run_dir):
    return read_json(run_dir / "config.json")["policy"]["start_version"]


def test_the_student_scores_as_before_and_the_compiled_program_as_learned(policy, tmp_path):
    student = student_of(policy)
    before = score(student)
    compiled = compile_(tmp_path / "run", student)
    assert (before, score(student), score(compiled)) == (0, 0, 1)
    versions = [lm.version for lm in (policy.lm, student.first.lm, compiled.first.lm, policy.latest_lm)]
    assert versions == [0, 0, 1, 1]
    assert (policy.version, policy.lm_version) == (1, 0)


def test_a_second_compile_of_the_student_starts_where_its_lm_is(policy, tmp_path):
    student = student_of(policy)
    first = compile_(tmp_path / "one", student)
    asked = len(policy.engine.requests)
    second = compile_(tmp_path / "two", student)
    assert policy.engine.requests[asked].version == start_of(tmp_path / "two") == 0
    assert (first.first.lm.version, second.first.lm.version) == (1, 2)  # numbers are never used twice
    assert score(first) == score(second) == 1


def test_compiling_the_compiled_program_goes_on_from_it(policy, tmp_path):
    compiled = compile_(tmp_path / "one", student_of(policy))
    asked = len(policy.engine.requests)
    compile_(tmp_path / "two", compiled)
    assert policy.engine.requests[asked].version == start_of(tmp_path / "two") == 1
    assert (compiled.first.lm.version, policy.lm.version) == (1, 0)


def test_a_student_that_follows_is_at_the_best_version_in_the_end(policy, tmp_path):
    student = student_of(policy)
    compiled = compile_(tmp_path / "run", student, student_follows=True)
    assert student.first.lm.version == compiled.first.lm.version == policy.lm_version == 1
    compile_(tmp_path / "again", student)
    assert (start_of(tmp_path / "again"), policy.lm_version) == (1, 1)


def test_the_student_called_by_a_callback_answers_as_it_was(policy, tmp_path):
    student, seen = student_of(policy), []

    def watch(line):
        if line["kind"] == "step":
            student.first(question="q")
            seen.append((policy.version, policy.engine.requests[-1].version))

    compile_(tmp_path / "run", student, callbacks=[watch])
    assert seen == [(1, 0)]


def test_a_compile_that_broke_leaves_the_lm_where_it_was(policy, tmp_path):
    def broken(example, prediction, trace=None):
        if policy.version:
            raise ZeroDivisionError
        return metric(example, prediction).score

    student = student_of(policy)
    with pytest.raises(MetricError):
        compile_(tmp_path / "run", student, metric=broken)
    assert policy.version == 1
    assert (policy.lm_version, score(student)) == (0, 0)
    resumed = compile_(tmp_path / "run", student, resume=True)
    assert (resumed.first.lm.version, policy.lm_version, score(student)) == (1, 0, 0)


def test_the_version_that_the_lm_stays_at_is_never_retired(policy, tmp_path, tiny_model):
    move_adapter(policy)
    policy.publish()
    policy.save(tmp_path / "adapter")
    ours = Policy(tiny_model, adapter=tmp_path / "adapter", max_tokens=8)
    try:
        for _ in range(2):
            ours.publish()
            ours.retire_all_but({ours.version})
        gc.collect()
        assert (ours.lm_version, ours.engine.versions()) == (1, {0, 1, 3})
        assert ours.lm("a")
        ours.start_over()
        assert (ours.lm_version, ours.version) == (0, 0)
    finally:
        ours.close()


def test_the_lm_moves_to_another_served_version_when_told(policy):
    version = policy.publish()
    assert policy.lm.version == 0
    policy.move_lm(version)
    assert (policy.lm.version, policy.lm.copy(temperature=0.5).version) == (version, version)
    with pytest.raises(UserError, match="is at policy version 7, which"):
        policy.move_lm(7)


def test_lms_and_policies_say_which_version_they_are_at(policy, tmp_path):
    policy.publish()
    assert repr(policy.lm) == "PolicyLM('model', version=0, stays)"
    assert repr(policy.latest_lm) == "PolicyLM('model', version=1, follows the policy)"
    assert repr(policy.lm_at(1).copy(temperature=0.5)) == "PolicyLM('model', version=1, stays, temperature=0.5)"
    assert repr(policy.base_lm) == "PolicyLM('model', version=0, stays, frozen)"
    assert repr(policy).endswith("engine='custom', version=1, lm_version=0)")


def test_settings_of_the_students_lm_hold_in_the_run_and_after_it(policy, tmp_path):
    student = student_of(policy, second=policy.lm.copy(temperature=0.3))
    compiled = compile_(tmp_path / "run", student)
    assert (compiled.second.lm.kwargs["temperature"], compiled.second.lm.version) == (0.3, 1)
    assert compiled.first.lm.kwargs["temperature"] is None
    assert {request.temperature for request in policy.engine.requests if request.version == 1} >= {0.3}
