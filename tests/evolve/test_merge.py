"""GEPA's merge: which pair, by which ancestor, and what comes of it."""

import subprocess
import sys

import pytest

from fst_optimizer.evolve.merge import by_gain, common_ancestor, merged, next_merge, telling_examples
from fst_optimizer.types import Candidate

ROOT = Candidate({"first": "One.", "second": "Two."})
A = Candidate({"first": "One better.", "second": "Two."}, (ROOT.id,))
B = Candidate({"first": "One.", "second": "Two better."}, (ROOT.id,))
C = Candidate({"first": "One better.", "second": "Two best."}, (A.id,))


def known(*candidates):
    return {candidate.id: candidate for candidate in candidates}


def test_each_text_comes_from_the_one_that_changed_it():
    assert merged(ROOT.texts, A.texts, B.texts) == {"first": "One better.", "second": "Two better."}
    assert merged(ROOT.texts, B.texts, A.texts) == {"first": "One better.", "second": "Two better."}


def test_where_both_changed_a_text_the_better_one_s_stays():
    assert merged(ROOT.texts, C.texts, B.texts) == C.texts
    assert merged(ROOT.texts, B.texts, C.texts) == {"first": "One better.", "second": "Two better."}


def test_what_a_nearer_ancestor_had_already_is_no_change_of_its_own():
    """Both come from A, which had changed `first`: D changed it again, D's counts, not the better one's."""
    d = Candidate({"first": "One best.", "second": "Two."}, (A.id,))
    assert merged(A.texts, C.texts, d.texts) == {"first": "One best.", "second": "Two best."}
    assert merged(ROOT.texts, C.texts, d.texts)["first"] == "One better."


def test_the_nearest_known_ancestor_is_taken_else_the_programs_own_instructions():
    d = Candidate({"first": "One best.", "second": "Two."}, (A.id,))
    assert common_ancestor(C, d, known(ROOT, A, C, d), ROOT) == A
    assert common_ancestor(C, d, known(C, d), ROOT) == ROOT  # A has left the population
    assert common_ancestor(C, B, known(ROOT, A, B, C), ROOT) == ROOT


@pytest.mark.parametrize(("one", "other"), [(A, C), (C, A), (ROOT, C), (B, ROOT)])
def test_a_candidate_and_its_descendant_are_not_merged(one, other):
    assert common_ancestor(one, other, known(ROOT, A, B, C), ROOT) is None
    assert common_ancestor(one, other, {}, ROOT) is None


def test_the_pair_with_most_to_gain_comes_first_and_the_better_of_it():
    scores = {
        "a": {"1": 1.0, "2": 0.0, "3": 0.0},
        "b": {"1": 1.0, "2": 0.5, "3": 0.0},
        "c": {"1": 0.0, "2": 0.0, "3": 1.0},
    }
    # Example by example: b and c come to 1 + .5 + 1, a and c to 1 + 0 + 1, a and b to 1 + .5 + 0.
    assert by_gain(["a", "b", "c"], scores) == [("b", "c"), ("a", "c"), ("b", "a")]


def test_examples_are_taken_in_turns_from_those_that_tell_and_those_that_do_not():
    one = {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.5, "5": 0.5}
    other = {"1": 0.0, "2": 0.0, "3": 1.0, "4": 0.5, "5": 0.5}
    for seed in range(5):
        first, second, third, fourth = telling_examples(one, other, 4, str(seed))
        assert {first, fourth} == {"1", "2"} and second == "3" and third in ("4", "5")
    assert sorted(telling_examples(one, other, 9, "0")) == ["1", "2", "3", "4", "5"]


def test_a_merge_has_two_parents_and_is_made_once():
    scores = {A.id: {"1": 1.0, "2": 0.0}, B.id: {"1": 0.0, "2": 0.5}}
    child = next_merge([A.id, B.id], scores, known(ROOT, A, B), ROOT, 7)
    assert (child.parents, child.origin, child.cycle) == ((A.id, B.id), "merge", 7)
    assert child.texts == {"first": "One better.", "second": "Two better."}
    assert next_merge([A.id, B.id], scores, known(ROOT, A, B, child), ROOT, 7) is None


def test_two_are_not_merged_where_their_ancestor_is_better_than_one():
    scores = {A.id: {"1": 1.0, "2": 0.0}, B.id: {"1": 0.0, "2": 0.5}, ROOT.id: {"1": 0.75, "2": 0.0}}
    assert next_merge([A.id, B.id], scores, known(ROOT, A, B), ROOT, 0) is None
    scores[ROOT.id] = {"1": 0.5, "2": 0.0}
    assert next_merge([A.id, B.id], scores, known(ROOT, A, B), ROOT, 0) is not None


def test_with_one_predictor_there_is_nothing_to_merge():
    one, other = (Candidate({"only": text}, ("root",)) for text in ("x", "y"))
    root = Candidate({"only": "Go."})
    scores = {one.id: {"1": 1.0, "2": 0.0}, other.id: {"1": 0.0, "2": 1.0}}
    assert next_merge([one.id, other.id], scores, known(one, other), root, 0) is None


def test_every_process_merges_the_same():
    """GEPA's own merge goes by the order of sets of strings, which differs between processes."""
    code = (
        "from fst_optimizer.evolve.merge import *\n"
        "names = [f'c{i}' for i in range(6)]\n"
        "scores = {n: {f'e{j}': float((i * j) % 3 == 0) for j in range(9)} for i, n in enumerate(names)}\n"
        "print(by_gain(names, scores), telling_examples(scores['c1'], scores['c2'], 6, 's'))\n"
    )
    said = set()
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code]
        said.add(subprocess.run(run, env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True).stdout)
    assert len(said) == 1 and "e" in said.pop()
