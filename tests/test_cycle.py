"""The cycle on a scripted policy: what each part takes from the one before it, and hands on."""

import json
from dataclasses import replace

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.cycle import run_cycle, validate
from fst_optimizer.optimizer import FST
from fst_optimizer.run.state import Best, State, ValidationScore
from fst_optimizer.store.files import RunFiles
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.types import Candidate, Population

SEED, OTHER = Candidate({"self": "Say A."}), Candidate({"self": "Say B."})
SETTINGS = {
    "fast": {"anchor_size": 4, "population": 2, "max_rollouts": 40, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": 4},
    "train": {"steps_per_cycle": 2},
    "eval": {"kl_examples": 2},
    "monitors": {"flat": "off"},
}


def examples(start, count):
    return [dspy.Example(question=f"q{n}", answer="A").with_inputs("question") for n in range(start, start + count)]


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=float(prediction.answer == example.answer), feedback="Always answer A.")


def answer(prompt, request):
    """A, greedily; half of the time when sampled."""
    word = "A" if request.temperature == 0 or request.seed % 2 else "B"
    return f"[[ ## answer ## ]]\n{word}\n\n[[ ## completed ## ]]"


@pytest.fixture
def run(scripted, tmp_path):
    """A run as `FST.compile` puts it together, before its first cycle."""
    program = dspy.Predict("question -> answer")
    program.set_lm(scripted(answer).lm)
    fst = FST(metric, config=FSTConfig.from_dict(SETTINGS), run_dir=tmp_path / "run")
    given = fst.check(program, examples(0, 12), valset=examples(100, 4))
    made = fst.prepare(program, given, RunFiles(fst.run_dir))
    fst.run_dir.mkdir()
    yield made
    made.saver.close()


def test_weights_are_trained_under_the_seed_where_a_prompt_is_not_better(run):
    adaptive = replace(run, config=run.config.with_values({"allocation": "adaptive", "budget.max_rollouts": 999}))
    searched = run_cycle(adaptive, start(OTHER, seed=SEED, started=True))  # both are right on the anchor
    assert searched.population.candidates == (SEED,)
    trained = run_cycle(adaptive, searched)
    assert [line["kind"] for line in lines(run)] == ["fast", "eval", "eval", "step", "step", "eval"]
    kept = (run.files.root / "rollouts" / "cycle-000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["candidate"] for line in kept} == {SEED.id}
    assert trained.ledger.spent_weights == trained.rollouts.slow == 2 * 2 * 4
    # What was decided is said in the first line of its cycle.
    assert [line.get("reason", "") for line in lines(run)] == [
        "nothing is known of the prompts yet",
        "",
        "",
        "the last fast round had nothing new to try, and the weights are still version 0",
        "",
        "",
    ]


def start(*candidates, **fields):
    return State(population=Population(candidates or (SEED,)), best=Best(SEED, 0, 0.0), **fields)


def lines(run):
    path = RunFiles(run.files.root).metrics
    return read_metrics(path) if path.exists() else []


def test_a_cycle_is_a_fast_round_an_evaluation_the_steps_and_an_evaluation(run):
    state = run_cycle(run, start(started=True))
    assert [line["kind"] for line in lines(run)] == ["fast", "eval", "step", "step", "eval"]
    assert (state.cycle, state.phase, state.step, state.batch) == (1, 0, 2, 2)
    assert state.rollouts.slow == 2 * 2 * 4  # steps x examples x G


def test_a_resumed_cycle_goes_on_behind_the_phases_that_are_done(run):
    state = run_cycle(run, start(started=True, phase=3, step=1))
    assert [line["kind"] for line in lines(run)] == ["step", "eval"]
    assert state.step == 2 and state.rollouts.fast == 0


def test_a_candidate_is_validated_once_at_a_version(run):
    state = validate(run, start())
    scores = dict.fromkeys(("val-0", "val-1", "val-2", "val-3"), 1.0)
    assert state.best.tokens_per_answer > 0
    assert replace(state.best, tokens_per_answer=0.0) == Best(SEED, 0, 1.0, 0.0, scores)
    spent = run.meter.rollouts.eval
    assert validate(run, state) == state
    assert run.meter.rollouts.eval == spent == 4
    assert [line["kind"] for line in lines(run)] == ["eval"]
    assert validate(run, state, again=True) == state
    assert [line["kind"] for line in lines(run)] == ["eval", "eval"]


def test_a_score_of_an_older_version_is_thrown_away(run):
    old = {SEED.id: ValidationScore(3, 0.25, 0.1, 0, 4)}
    state = validate(run, start(validated=old))
    assert state.validated[SEED.id].score == 1.0


def test_the_best_pair_is_replaced_by_a_better_score_only(run):
    held = Best(OTHER, 0, 1.0, 0.5)
    assert validate(run, replace(start(), best=held)).best == held


def test_the_leading_candidate_has_the_best_mean_and_the_earlier_wins_a_tie():
    scores = {SEED.id: {"a": 0.5, "b": 0.5}, OTHER.id: {"a": 1.0, "b": 0.0}}
    assert Population((SEED, OTHER), 0, scores).leading(1) == (SEED,)
    better = {**scores, OTHER.id: {"a": 1.0, "b": 0.5}}
    assert Population((SEED, OTHER), 0, better).leading(2) == (OTHER, SEED)
