"""A policy as reflection LM: what it samples follows from the run, and costs nothing."""

from types import SimpleNamespace

import dspy
import pytest

from fst_optimizer import Policy
from fst_optimizer.config.run import METHODS, BudgetConfig
from fst_optimizer.evolve.reflect import LMReflector
from fst_optimizer.evolve.reflection_lm import sampling_options
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.store.meter import Meter
from helpers.toy import (
    TRAIN,
    VAL,
    Reflection,
    answer,
    assert_same_run,
    optimizer,
    run_toy,
    student_of,
)

VALUES = {"fast.minibatch": 3, "fast.max_proposals": 3}


@pytest.fixture
def reflector(tiny_model):
    """Makes a reflection LM, each on a policy of its own: a random model that writes eight random letters."""
    made = []

    def make(**settings):
        made.append(Policy(tiny_model, temperature=1.0, max_tokens=8, **settings))
        return made[-1].base_lm

    yield make
    for policy in made:
        policy.close()


def test_the_seed_follows_from_the_run_and_the_number_of_the_reflection(reflector):
    lm = reflector()
    seeds = [sampling_options(lm, seed, number)["seed"] for seed in (0, 1) for number in (1, 2)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**64 for seed in seeds)
    assert sampling_options(reflector(seed=5), 0, 1) == {"seed": seeds[0]}
    assert sampling_options(lm.copy(n=2), 0, 1) == {"seed": seeds[0], "n": 1}
    assert sampling_options(lm.copy(seed=3), 0, 1) == {}  # somebody wants just that
    assert sampling_options(dspy.LM("openai/any", api_key="none"), 0, 1) == {}


def test_the_same_prompt_is_answered_anew_and_the_same_in_another_process(reflector):
    dataset = [{"Inputs": {"question": "q"}, "Generated Outputs": {"answer": "a"}, "Feedback": "Wrong.", "Score": 0.0}]
    answers = []
    for before in (0, 0, 2):
        one = LMReflector(reflector(), seed=4)
        Meter(BudgetConfig(), one).resume(SimpleNamespace(**STATE, reflection_calls=before), 0.0)
        answers.append([one("first", "Answer.", dataset) for _ in range(4 - before)])
    first, again, later = answers
    assert len(set(first)) == 4 and first == again
    assert later == first[2:]


STATE = {
    **{"rollouts": None, "tokens": 0, "usage": {}, "crashes": (), "reflection_cost_usd": 0.0},
    "tally": SimpleNamespace(outcomes={}, first_error=None),
}


@pytest.mark.parametrize("place", [("reflection.answer", 2), ("trainer.step", 3)])
def test_a_run_with_a_sampling_policy_as_reflector_resumes_to_the_same(scripted, reflector, tmp_path, place):
    """It dies after its first reflection, or in its second cycle, and goes on in another process."""

    def run(name, **options):
        return run_toy(tmp_path / name, scripted(answer), values=VALUES, reflection_lm=reflector(), **options)

    whole = run("whole")
    assert whole["reflection_calls"] > 4 and whole["cost_usd"] == 0.0
    with inject(place[0], raising(KeyboardInterrupt()), after=place[1]), pytest.raises(KeyboardInterrupt):
        run("killed")
    run("killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_runs_of_other_seeds_get_other_proposals(scripted, reflector, tmp_path):
    found = []
    for seed in (0, 1):
        with inject("reflection.answer", lambda text: found.append(text) or text):
            run_toy(tmp_path / str(seed), scripted(answer), values=VALUES | {"seed": seed}, reflection_lm=reflector())
    assert len(set(found)) == len(found)


def test_a_policy_as_reflector_is_not_tried_out_and_has_no_price(scripted, reflector, tmp_path, monkeypatch):
    def drawn(self):
        raise AssertionError("a seed was drawn that depends on what the process has asked before")

    lm = reflector()
    monkeypatch.setattr(Policy, "fresh_seed", drawn)
    values = VALUES | {"run.dry_run": True, "budget.prices": {"model": [1.0, 1.0]}, "budget.max_cost_usd": 1.0}
    fst = optimizer(tmp_path / "run", values=values, reflection_lm=lm)
    found = fst.dry_run(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    assert next(one.text for one in found.findings if one.name == "reflection").endswith("was not asked")
    assert "$" not in found.plan
    result = run_toy(tmp_path / "run", scripted(answer), values=values, reflection_lm=lm)
    assert result["reflection_calls"] and result["cost_usd"] == 0.0


@pytest.mark.parametrize("kind", ["extractive", "lm", "policy"])
def test_the_cap_of_reflections_holds_for_every_method_and_every_reflector(scripted, reflector, tmp_path, kind):
    for method in METHODS:
        lm = {"extractive": lambda: None, "lm": Reflection, "policy": reflector}[kind]()
        values = {**VALUES, "method": method, "fast.reflection_calls": 3, "budget.max_rollouts": 40}
        result = run_toy(tmp_path / method, scripted(answer), values=values, reflection_lm=lm)
        assert result["reflection_calls"] <= 3
        assert bool(result["reflection_calls"]) == (method != "rl")
