import json
import math
from dataclasses import replace

import pytest

from fst_optimizer.run.monitors import Alarm, Watch
from fst_optimizer.run.state import Best, State, ValidationScore
from fst_optimizer.store.tally import FirstError, Tally
from fst_optimizer.types import Candidate, Population, RolloutCounts, Usage

SEED = Candidate({"answer": "Say it."})
STATE = State(population=Population((SEED,), 0, {SEED.id: {"train-1": 0.5}}), best=Best(SEED, 0, 0.5, 0.0))


def test_a_state_survives_json():
    state = replace(
        STATE, cycle=1, phase=3, started=True, step=6, batch=6, rollouts=RolloutCounts(1, 2, 3, 4), ended="budget"
    )
    tally = Tally({"ok": 8, "timeout": 1}, FirstError("timeout", "late", "val-1"))
    state = replace(state, tally=tally, crashes=("KeyError at a.py:3 in forward",))
    state = replace(state, reflection_cost_usd=None, usage={"openai/judge": Usage(3, 100, 40, 20)})
    state = replace(state, watch=Watch(flat=2, rewards=(0.5,), evals=((0.1, 0.2),), told=("kl",), alarms=("kl: far",)))
    assert State.from_json(state.to_json()) == state


def test_a_state_that_an_earlier_version_wrote_is_read_and_written_the_same():
    candidate = {"id": SEED.id, "texts": {"answer": "Say it."}, "parents": [], "origin": "seed", "cycle": 0}
    written = {
        "population": {"policy_version": 3, "candidates": [candidate], "scores": {SEED.id: {"train-1": 0.5}}},
        "best": {"candidate": candidate, "policy_version": 2, "score": None, "kl_to_base": 0.0},
        **{"cycle": 1, "phase": 4, "started": True, "step": 3, "batch": 6, "policy_version": 3},
        "rollouts": {"fast": 48, "slow": 192, "eval": 48, "reused": 24},
        **{"reflection_calls": 6, "reflection_cost_usd": 0.0},
        "usage": {"openai/judge": {"calls": 1, "prompt_tokens": 2, "cached_tokens": 0, "completion_tokens": 3}},
        "validated": {SEED.id: {"policy_version": 0, "score": 0.7, "kl_to_base": 0.1, "failed": 1, "rollouts": 16}},
        **{"tokens": 900, "val_score_before": 0.1, "test_score_before": None, "ended": "", "cap": ""},
        "watch": {
            **{"flat": 0, "entropy": 1, "format": 0, "rewards": [0.65, 0.7], "evals": [[0.6, 0.7]]},
            **{"best": 0.7, "stale": 0, "told": ["entropy"], "alarms": ["entropy: low"]},
        },
    }
    state = State.from_json(json.loads(json.dumps(written)))
    new = {"outcomes": {}, "first_error": None}
    usage = {"openai/judge": written["usage"]["openai/judge"] | {"untold": 0}}
    validated = {SEED.id: written["validated"][SEED.id] | {"tally": new}}
    validated[SEED.id] |= {"scores": {}, "lost": 0, "tokens_per_answer": 0.0}
    # What it did not have: nothing is known of it.
    assert state.to_json() == written | {
        "best": written["best"] | {"scores": {}, "tokens_per_answer": 0.0},
        **{"barren": 0, "tried": [], "search_over": ""},
        "warnings": [],
        "tally": new,
        "crashes": [],
        "validated": validated,
        "usage": usage,
        "kept": {},
        "stream": None,
        **{"seed": None, "ledger": None, "validated_at": 0},
        "teacher": None,
        **{"for_groups": [], "success": {}, "success_now": {}},
    }
    assert (state.watch.evals, state.validated[SEED.id].failed, state.best.score) == (((0.6, 0.7),), 1, -math.inf)


def measured(scores):
    return ValidationScore(0, sum(scores.values()) / len(scores), 0.0, 0, len(scores), scores=scores)


@pytest.mark.parametrize(
    ("before", "found", "beaten"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.25}, True),
        ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}, False),
        # On the examples that both answered: .25 each against 1 and 0, though the mean of all four is .5.
        ({"a": 0.25, "b": 0.25, "c": 1.0, "d": 0.5}, {"a": 1.0, "b": 0.0}, True),
        # An easy half alone makes nothing better.
        ({"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}, {"a": 1.0, "b": 1.0}, False),
        # Too few in common say nothing.
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}, {"a": 1.0}, False),
        # What was lost before is no drawback for what comes after it.
        ({"a": 1.0}, {"a": 1.0, "b": 0.0, "c": 0.0}, False),
        ({"a": 0.5}, {"a": 1.0, "b": 0.0, "c": 0.0}, True),
    ],
)
def test_pairs_are_compared_on_the_examples_that_both_answered(before, found, beaten):
    held = measured(before)
    assert Best(SEED, 0, held.score, scores=before).beaten_by(measured(found)) == beaten


def test_a_best_pair_whose_examples_are_not_known_is_compared_by_its_mean():
    assert Best(SEED, 0, 0.5).beaten_by(measured({"a": 0.75}))
    assert not Best(SEED, 0, 0.5).beaten_by(measured({"a": 0.5}))


def test_alarms_of_the_last_phase_are_not_written():
    assert "alarms" not in replace(STATE, alarms=(Alarm("kl", "far"),)).to_json()


def test_before_anything_is_validated_there_is_a_best_pair_that_any_score_beats():
    state = replace(STATE, best=Best(SEED, 3))
    again = State.from_json(state.to_json())
    assert again == state
    assert again.best.score == -math.inf


def test_a_run_is_over_when_the_cycle_that_ended_it_is():
    ended = replace(STATE, ended="budget", phase=3)
    assert not ended.over
    assert replace(ended, phase=0).over
