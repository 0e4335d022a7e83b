import threading

import dspy
import pytest
from dspy.utils import DummyLM

from fst_optimizer.errors import UserError
from fst_optimizer.program.texts import apply_texts, seed_texts


class Nested(dspy.Module):
    def __init__(self):
        super().__init__()
        self.alone = dspy.Predict("question -> answer")
        self.listed = [dspy.Predict("question -> middle"), dspy.ChainOfThought("middle -> answer")]
        self.keyed = {"check": dspy.Predict("answer -> ok: bool")}


def test_texts_of_predictors_in_attributes_lists_and_dicts():
    assert sorted(seed_texts(Nested())) == ["alone", "keyed['check']", "listed[0]", "listed[1].predict"]


def test_applied_texts_are_read_back_and_the_original_is_untouched():
    program = Nested()
    before = seed_texts(program)
    texts = {name: f"Rule for {name}." for name in before}
    assert seed_texts(apply_texts(program, texts)) == texts
    assert seed_texts(program) == before


def test_texts_of_some_components_leave_the_others():
    program = Nested()
    fresh = apply_texts(program, {"alone": "New."})
    assert seed_texts(fresh) == {**seed_texts(program), "alone": "New."}


def test_demos_stay_and_the_lm_is_shared_not_copied():
    program, lm, other = Nested(), DummyLM([{"answer": "x"}]), DummyLM([{"answer": "y"}])
    program.set_lm(lm)
    program.judge = other
    program.alone.demos = [dspy.Example(question="a", answer="b")]
    fresh = apply_texts(program, {"alone": "New."})
    assert fresh.alone.demos == program.alone.demos
    assert fresh.alone.demos is not program.alone.demos
    assert all(predictor.lm is lm for predictor in fresh.predictors())
    assert fresh.judge is other


def test_a_bare_predictor_is_a_program():
    assert seed_texts(apply_texts(dspy.Predict("a -> b"), {"self": "Go."})) == {"self": "Go."}


def test_what_cannot_be_copied_is_shared_and_predictors_never_are():
    program = Nested()
    program.lock = threading.Lock()
    program.listed[0].client = {"lock": threading.Lock()}
    fresh = apply_texts(program, {"listed[0]": "New."})
    assert fresh.lock is program.lock
    assert fresh.listed[0] is not program.listed[0]
    assert seed_texts(program)["listed[0]"] != "New."


def test_an_unknown_component_is_named_with_the_nearest_known_one():
    with pytest.raises(UserError, match="no predictor 'alon'; did you mean 'alone'"):
        apply_texts(Nested(), {"alon": "New."})
