import math
from dataclasses import replace

from fst_optimizer.run.monitors import Watch
from fst_optimizer.run.state import Best, State
from fst_optimizer.types import Candidate, Population, RolloutCounts, Usage

SEED = Candidate({"answer": "Say it."})
STATE = State(population=Population((SEED,), 0, {SEED.id: {"train-1": 0.5}}), best=Best(SEED, 0, 0.5, 0.0))


def test_a_state_survives_json():
    state = replace(
        STATE, cycle=1, phase=3, started=True, step=6, batch=6, rollouts=RolloutCounts(1, 2, 3, 4), ended="budget"
    )
    state = replace(state, reflection_cost_usd=None, usage={"openai/judge": Usage(3, 100, 40, 20)})
    state = replace(state, watch=Watch(flat=2, rewards=(0.5,), evals=((0.1, 0.2),), told=("kl",), alarms=("kl: far",)))
    assert State.from_json(state.to_json()) == state


def test_before_anything_is_validated_there_is_a_best_pair_that_any_score_beats():
    state = replace(STATE, best=Best(SEED, 3))
    again = State.from_json(state.to_json())
    assert again == state
    assert again.best.score == -math.inf


def test_a_run_is_over_when_the_cycle_that_ended_it_is():
    ended = replace(STATE, ended="budget", phase=3)
    assert not ended.over
    assert replace(ended, phase=0).over
