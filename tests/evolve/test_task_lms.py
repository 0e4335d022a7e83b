"""The reflection LMs that tasks bring: what they answer follows from the prompt and a seed, and they cost nothing."""

import subprocess
import sys

import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.dry_run import check_reflection
from fst_optimizer.evolve import task_lms
from fst_optimizer.evolve.reflect import LMReflector
from fst_optimizer.evolve.task_lms import random_sentences, trained_reflector
from fst_optimizer.store.journal import Journal
from fst_optimizer.testing.tiny import make_tiny_model

WORDS = ("Sort the letters.", "Reverse the letters.", "Copy the letters.", "Drop the first letter.")
ENTRY = {"Inputs": {"letters": "a b"}, "Generated Outputs": {"answer": "a"}, "Feedback": "Score 0.25.", "Score": 0.25}


def drawn():
    return random_sentences("letters", lambda rng: rng.choice(WORDS))


def asked(lm, *currents, journal=None, seed=0):
    reflector = LMReflector(lm, seed=seed)
    reflector.journal = journal or Journal()
    return [reflector("first", current, [ENTRY]) for current in currents]


def test_a_random_sentence_is_the_backticked_text_of_a_draw():
    assert drawn()("anything", seed=3) == drawn()("anything", seed=3)
    answers = {drawn()("anything", seed=seed)[0] for seed in range(40)}
    assert answers == {f"```\n{text}\n```" for text in WORDS}


def test_another_run_of_it_draws_the_same_and_a_prompt_that_comes_again_another_sentence():
    first = asked(drawn(), *("Answer.",) * 12)
    assert first == asked(drawn(), *("Answer.",) * 12)
    assert len(set(first)) > 1
    assert first != asked(drawn(), *("Answer.",) * 12, seed=1)


def test_it_reads_no_feedback_but_what_is_asked_decides():
    reflector = LMReflector(drawn())
    told = dict(ENTRY, Feedback="Sort the letters.")
    assert len({reflector("first", f"Text {i}.", [told]) for i in range(40)} & set(WORDS)) == len(WORDS)


def test_a_resumed_run_finds_its_answers_in_the_journal(tmp_path):
    currents = [f"Text {number}." for number in range(4)]
    whole = asked(drawn(), *currents)
    journal = Journal(tmp_path / "journal")
    asked(drawn(), *currents[:2], journal=journal)
    journal.close()
    assert asked(drawn(), *currents, journal=Journal(tmp_path / "journal")) == whole


def test_it_costs_nothing_and_a_run_begins_without_asking_it():
    reflector = LMReflector(drawn())
    sizes = type("Sizes", (), {"components": 1})()
    finding = check_reflection(FSTConfig(), sizes, reflector)
    assert (finding.level, finding.text) == ("ok", f"{reflector.model}, a policy of this process, was not asked")
    assert reflector("first", "Answer.", [ENTRY]) in WORDS
    assert reflector.cost_usd == 0.0 and reflector.calls == 1


@pytest.fixture
def folder(tmp_path):
    return make_tiny_model(tmp_path / "family" / "reflector")


def test_a_trained_reflectors_name_is_no_path(folder):
    assert trained_reflector(folder).model == "hosted_vllm/family-reflector"


def test_a_trained_reflector_samples_by_seed_and_nothing_of_it_is_trained(folder):
    lm = trained_reflector(folder)
    answers = [lm("What now?", seed=seed)[0] for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) == 3
    again = asked(trained_reflector(folder), "Answer.", "Answer.")
    assert again == asked(trained_reflector(folder), "Answer.", "Answer.")
    policy = task_lms._policy(str(folder))
    assert policy.version == 0 and policy.temperature == 1.0


def test_a_trained_reflector_is_loaded_when_it_is_asked():
    code = (
        "import sys; from fst_optimizer.evolve.task_lms import trained_reflector; trained_reflector('nowhere'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
