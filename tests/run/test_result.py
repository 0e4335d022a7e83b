"""`detailed_results` under the names of `dspy.GEPA`: values by hand, and on a run."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import cloudpickle
import dspy
import pytest

from fst_optimizer import FST, CompileResult
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.run.state import Best
from fst_optimizer.store.files import read_json
from fst_optimizer.types import Candidate, Population
from helpers.toy import SETTINGS, TRAIN, VAL, Program, answer, metric, optimizer, student_of

SEED = Candidate({"first": "Answer.", "second": "Answer."})
LOST = Candidate({"first": "Lost.", "second": "Answer."}, (SEED.id,), "reflection", 0)
CHILD = Candidate({"first": "Answer.", "second": "Child."}, (SEED.id,), "reflection", 0)
GRANDCHILD = Candidate({"first": "Grand.", "second": "Child."}, (CHILD.id, LOST.id), "reflection", 2)
RESULT = {"rollouts": {"fast": 50, "slow": 30, "eval": 20, "reused": 9}, "seed": 7}
SCORES = {
    GRANDCHILD.id: {"train-4": 1.0, "train-2": 0.0},
    CHILD.id: {"train-4": 0.5, "train-2": 0.25},
    SEED.id: {"train-4": 1.0, "train-2": 0.25},
}


def found(best=CHILD, scores=SCORES, population=(GRANDCHILD, CHILD, SEED)):
    return CompileResult(
        run_dir=Path("runs") / "one",
        result=RESULT,
        population=Population(population, 6, scores),
        best=Best(best, 3, 0.75),
        program=Program(),
        round_ends={0: 24, 1: 50, 2: 81},
        num_full_val_evals=5,
    )


def test_the_values_by_hand():
    result = found()
    assert [seed_texts(one) for one in result.candidates] == [dict(c.texts) for c in (GRANDCHILD, CHILD, SEED)]
    # The grandchild's parents are the child, at place 1, and one that the population has lost.
    assert result.parents == [[1, None], [2], [None]]
    assert result.val_aggregate_scores == [0.5, 0.375, 0.625]
    assert result.val_subscores == [SCORES[one.id] for one in (GRANDCHILD, CHILD, SEED)]
    assert result.per_val_instance_best_candidates == {"train-4": {0, 2}, "train-2": {1, 2}}
    assert result.highest_score_achieved_per_val_task == {"train-4": 1.0, "train-2": 0.25}
    assert result.discovery_eval_counts == [81, 24, 0]
    assert (result.total_metric_calls, result.num_full_val_evals) == (100, 5)
    assert (result.log_dir, result.seed) == (str(Path("runs") / "one"), 7)
    # Chosen on the validation set, so that it does not have the highest score on the anchor.
    assert result.best_idx == 1
    assert result.best_candidate is result.program


def test_a_candidate_that_the_last_population_lost_is_the_last_one_and_unscored():
    result = found(best=LOST)
    assert seed_texts(result.candidates[3]) == dict(LOST.texts)
    assert (result.best_idx, result.parents[3], result.discovery_eval_counts[3]) == (3, [2], 24)
    assert result.parents[0] == [1, 3]
    assert (result.val_aggregate_scores[3], result.val_subscores[3]) == (None, {})
    assert result.per_val_instance_best_candidates == found().per_val_instance_best_candidates


def test_a_run_without_fast_rounds_has_a_candidate_and_no_scores():
    result = found(best=SEED, scores={}, population=(SEED,))
    assert (result.parents, result.val_aggregate_scores, result.val_subscores) == ([[None]], [None], [{}])
    assert (result.per_val_instance_best_candidates, result.best_idx, result.discovery_eval_counts) == ({}, 0, [0])


def test_all_of_it_is_plain_data_by_gepas_names():
    data = found(best=LOST).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["candidates"][3] == {"first": "Lost.", "second": "Answer."}
    assert data["per_val_instance_best_candidates"] == {"train-4": [0, 2], "train-2": [1, 2]}
    assert data["best_idx"] == 3
    theirs = dspy.teleprompt.gepa.gepa.DspyGEPAResult([Program()], [[None]], [0.5], [{0: 0.5}], {0: {0}}, [0])
    absent = {
        *("best_outputs_valset", "val_aggregate_subscores"),
        *("per_objective_best_candidates", "objective_pareto_front"),
    }
    assert set(data) == set(theirs.to_dict()) - absent
    for name in (*data, "best_candidate", "highest_score_achieved_per_val_task"):
        assert hasattr(theirs, name) and hasattr(found(), name)
    assert not any(hasattr(found(), name) for name in absent)


def test_a_copy_of_the_program_shares_the_result():
    program = Program()
    program.detailed_results = found()
    assert copy.deepcopy(program).detailed_results is program.detailed_results


def test_a_pickled_program_brings_its_result_along():
    program = Program()
    program.detailed_results = replace(found(), program=program)
    again = cloudpickle.loads(cloudpickle.dumps(program))
    assert again.detailed_results == program.detailed_results
    assert again.detailed_results.best_candidate is again
    assert again.detailed_results.to_dict() == found().to_dict()


def test_a_run_tells_what_its_files_do(scripted, tmp_path, lines):
    policy = scripted(answer)
    compiled = optimizer(tmp_path / "run").compile(student_of(policy), trainset=TRAIN, valset=VAL)
    result, metrics = compiled.detailed_results, lines(tmp_path / "run" / "metrics.jsonl")
    last = read_json(tmp_path / "run" / "population" / "cycle-000001.json")
    count = len(last["candidates"])
    assert [seed_texts(one) for one in result.candidates[:count]] == [one["texts"] for one in last["candidates"]]
    assert result.val_subscores[:count] == [last["scores"][one["id"]] for one in last["candidates"]]
    assert result.val_aggregate_scores[:count] == [sum(one.values()) / 3 for one in result.val_subscores[:count]]
    ends = {line["cycle"]: sum(line["rollouts"][kind] for kind in ("fast", "slow", "eval")) for line in metrics
            if line["kind"] == "fast"}  # fmt: skip
    assert result.discovery_eval_counts[:count] == [
        0 if one["origin"] == "seed" else ends[one["cycle"]] for one in last["candidates"]
    ]
    evals = [line for line in metrics if line["kind"] == "eval"]
    assert result.num_full_val_evals == len({(line["candidate"], line["policy_version"]) for line in evals}) > 1
    assert result.total_metric_calls == sum(result.result["rollouts"][kind] for kind in ("fast", "slow", "eval"))
    assert (result.log_dir, result.seed) == (str(tmp_path / "run"), 0)
    assert seed_texts(result.candidates[result.best_idx]) == seed_texts(compiled) == result.result["candidate"]
    assert result.best_candidate is compiled
    one = result.candidates[0]
    assert {predictor.lm.engine.version for predictor in one.predictors()} == {result.best.policy_version}
    assert one(question="q").answer in ("right", "wrong")


@pytest.mark.parametrize("track_stats", [True, False])
def test_track_stats_is_whether_the_program_has_them(scripted, tmp_path, track_stats):
    fst = FST(metric, config={**SETTINGS, "budget": {"max_cycles": 1}}, log_dir=tmp_path, track_stats=track_stats)
    compiled = fst.compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    assert hasattr(compiled, "detailed_results") == track_stats
    assert read_json(tmp_path / "result.json")["ended"] == "done"


def test_compile_takes_seed_and_threads_for_one_run(scripted, tmp_path):
    settings = {**SETTINGS, "method": "gepa", "budget": {"max_cycles": 1}}
    fst = FST(metric, config=settings, run_dir=tmp_path / "run", seed=1)
    compiled = fst.compile(student_of(scripted(answer)), trainset=TRAIN, seed=5, num_threads=2)
    recorded = read_json(tmp_path / "run" / "config.json")["config"]
    assert (recorded["seed"], recorded["rollout"]["num_threads"]) == (5, 2)
    assert compiled.detailed_results.seed == compiled.detailed_results.result["seed"] == 5
    assert (fst.config.seed, fst.config.rollout.num_threads) == (1, 4)
    held_out = {item.id for item in fst.check(student_of(scripted(answer)), TRAIN, seed=5).val}
    assert held_out != {item.id for item in fst.check(student_of(scripted(answer)), TRAIN).val}


def test_better_together_runs_it_with_a_seed_of_its_own(scripted, tmp_path):
    settings = {**SETTINGS, "method": "gepa", "budget": {"max_cycles": 1}}
    together = dspy.BetterTogether(metric=metric, p=FST(metric, config=settings, run_dir=tmp_path / "run"))
    best = together.compile(
        student_of(scripted(answer)),
        trainset=TRAIN,
        valset=VAL,
        strategy="p",
        optimizer_compile_args={"p": {"seed": 3, "num_threads": 2}},
    )
    assert not best.flag_compilation_error_occurred
    recorded = read_json(tmp_path / "run" / "config.json")["config"]
    assert (recorded["seed"], recorded["rollout"]["num_threads"]) == (3, 2)
