import json
import math
from dataclasses import replace

from fst_optimizer.run.monitors import Alarm, Watch
from fst_optimizer.run.state import Best, State
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
    # What it did not have: nothing is known of it.
    assert state.to_json() == written | {
        "warnings": [],
        "tally": new,
        "crashes": [],
        "validated": validated,
        "usage": usage,
        "kept": {},
    }
    assert (state.watch.evals, state.validated[SEED.id].failed, state.best.score) == (((0.6, 0.7),), 1, -math.inf)


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
