"""From failures to candidates: what the reflector is asked, and what becomes of its answers."""

from types import SimpleNamespace

import pytest

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.proposer import Proposer
from fst_optimizer.evolve.reflect import Reflector
from fst_optimizer.types import Candidate

PARENT = Candidate({"first": "One.", "second": "Two."})
FAILS, FINE = ({"Score": 0.5},), ({"Score": 1.0},)


class Scripted(Reflector):
    def __init__(self, answer):
        self.answer, self.calls, self.asked = answer, 0, []

    def __call__(self, component, current, dataset):
        self.calls += 1
        self.asked.append((component, current))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def proposed(answer, dataset, *, components=("first", "second"), left=None, wanted=("first", "second")):
    reflector, notes = Scripted(answer), []
    proposer = Proposer(reflector, [PARENT], components, 4, left, notes, FastConfig(), len)
    texts = proposer.reflect(dict(PARENT.texts), dataset, list(wanted))[0].new_texts
    return SimpleNamespace(proposer=proposer, texts=texts, notes=notes, asked=reflector.asked)


def test_a_new_text_makes_a_child_with_its_lineage():
    found = proposed(" Better. ", {"first": FAILS}, wanted=["first"])
    assert found.texts == {"first": "Better."}
    child = found.proposer.candidate({**PARENT.texts, **found.texts})
    assert (child.parents, child.origin, child.cycle) == ((PARENT.id,), "reflection", 4)
    assert found.proposer.asked == 1
    assert found.proposer.reflections == 1


@pytest.mark.parametrize("dataset", [{}, {"first": ()}, {"first": FINE}])
def test_a_component_that_did_not_fail_is_not_reflected_on(dataset):
    found = proposed("Better.", dataset)
    assert (found.texts, found.asked, found.proposer.asked) == ({}, [], 0)


def test_only_components_that_may_change_are_reflected_on():
    found = proposed("Better.", {"first": FAILS, "second": FAILS}, components=["second"])
    assert found.asked == [("second", "Two.")]
    assert found.texts == {"second": "Better."}


def test_no_more_reflections_are_made_than_are_left():
    found = proposed("Better.", {"first": FAILS, "second": FAILS}, left=1)
    assert found.asked == [("first", "One.")]
    assert found.proposer.exhausted


def test_texts_that_the_round_has_already_are_not_proposed_again():
    found = proposed("One.", {"first": FAILS}, wanted=["first"])
    assert found.texts == {}
    assert found.notes == [f"candidate {PARENT.id} was proposed again and not run"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "the reflector proposed nothing"),
        ("  ", "the reflector proposed nothing"),
        (OSError("away"), "OSError: away"),
    ],
)
def test_a_reflection_that_comes_to_nothing_is_noted(answer, why):
    found = proposed(answer, {"first": FAILS}, wanted=["first"])
    assert (found.texts, found.notes) == ({}, [f"no new text for first: {why}"])
    assert found.proposer.failure is None


def test_an_answer_that_could_not_be_written_down_is_kept_for_the_round_to_raise():
    error = StorageError("the disk is full")
    assert proposed(error, {"first": FAILS}, wanted=["first"]).proposer.failure is error
