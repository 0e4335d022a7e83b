"""What a run's files say of how it learned, from lines worked by hand."""

import pytest

from fst_optimizer.lab.facts import seconds_by_phase, told


def line(kind, cycle, time_s):
    return {"kind": kind, "cycle": cycle, "time_s": time_s}


LINES = [
    line("eval", 0, 1.0),
    line("fast", 0, 3.5),
    line("eval", 0, 4.0),
    line("step", 0, 6.0),
    line("eval", 0, 6.5),
    line("fast", 1, 7.5),
    line("step", 1, 9.0),
    line("eval", 1, 9.5),
]


def test_every_second_belongs_to_the_phase_whose_line_ends_it():
    found = seconds_by_phase(LINES, 12.0)
    assert found == pytest.approx({"fast": 2.5 + 1.0, "slow": 2.0 + 1.5, "eval": 1.0 + 0.5 + 0.5 + 0.5, "rest": 2.5})


@pytest.mark.parametrize(
    ("method", "reflection_lm", "fast", "expected"),
    [
        ("fst+k1", None, {}, (True, "extractive", False)),
        ("gepa", "hosted_vllm/reflector", {}, (True, "hosted_vllm/reflector", False)),
        ("rl", "hosted_vllm/reflector", {}, (False, None, False)),
        ("sft", None, {}, (False, None, True)),
        ("once", None, {"once_rollouts": 64}, (True, "extractive", False)),
        ("once+given", None, {"once_rollouts": 0}, (False, None, False)),
        ("dspy-together", "openai/gpt-5.2", {}, (True, "openai/gpt-5.2", False)),
    ],
)
def test_what_a_method_was_told(method, reflection_lm, fast, expected):
    recorded = {"config": {"fast": fast}, "program": {"reflection_lm": reflection_lm}, "policy": {"model": "m"}}
    found = told(method, recorded)
    assert (found["feedback"], found["reflector"], found["answers"]) == expected
    assert found["instructions"] is False
