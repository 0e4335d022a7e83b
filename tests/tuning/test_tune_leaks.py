"""What one trial leaves for the next: nothing."""

import gc
import json
from functools import partial
from itertools import pairwise

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fst_optimizer import FST, FSTConfig, LoraConfig, Policy, UserError
from fst_optimizer.config.overrides import read_settings, settled
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.model import lora
from fst_optimizer.store.files import read_json
from fst_optimizer.testing import ScriptedEngine, move_adapter
from fst_optimizer.tuning import api
from helpers.tiny_study import SPACE, TRAIN, TRAINING, VAL, answer, metric, student_of, tuned

CLOCKS = ("time_s", "step_s")


def fresh(policy, settings):
    """The policy of a process of its own, with a trial's adapter."""
    engine = lambda made: ScriptedEngine(made, answer)  # noqa: E731
    return Policy(policy.source, engine=engine, lora=settings.lora, seed=settings.config.seed)


def without_clocks(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


@pytest.mark.slow
def test_every_trial_is_what_a_run_in_a_fresh_process_would_be(scripted, tmp_path):
    """Also after trials with other adapters, failures and pruning: weights, scores and every number on the way."""
    policy = scripted(answer)
    result = tuned(policy, tmp_path / "study", trials=4, values=TRAINING, sampler="random")
    ranks = [row["params"]["lora.rank"] for row in result.summary["trials"]]
    assert any(before != after for before, after in pairwise(ranks)), "the test would show little"
    for run in sorted((tmp_path / "study" / "trials").iterdir())[1:]:
        settings = settled(FSTConfig(), read_settings(run / "config.json"))
        alone = fresh(policy, settings)
        folder = tmp_path / run.name
        FST(metric, config=settings.config, run_dir=folder).compile(student_of(alone), trainset=TRAIN, valset=VAL)
        alone.close()
        pruned = read_json(run / "result.json")["pruned"]
        ours, theirs = without_clocks(run / "metrics.jsonl"), without_clocks(folder / "metrics.jsonl")
        assert ours == (theirs[: len(ours)] if pruned else theirs)
        versions = {path.name for path in (run / "policy").iterdir()} & {p.name for p in (folder / "policy").iterdir()}
        assert versions or pruned
        for version in versions:
            ours, theirs = (load_file(one / "policy" / version / "adapter_model.safetensors") for one in (run, folder))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def generations(policy, version):
    prompt = policy.encode_chat([{"role": "user", "content": "What comes next?"}])
    requests = [
        GenerationRequest(prompt, 8, seed=seed, temperature=t, version=version) for seed in (0, 1) for t in (0, 1)
    ]
    return [policy.engine.submit(request).result(timeout=60) for request in requests]


def test_a_policy_that_starts_over_is_as_a_new_one(tiny_model):
    """The in-process engine: base, first adapter and random numbers, after an adapter of another rank."""
    used = Policy(tiny_model, lora=LoraConfig(rank=32, alpha=8, target_modules=("q_proj",)), seed=1)
    move_adapter(used)
    used.publish()
    used.publish()
    used.lm_at(2)
    used.start_over(LoraConfig(rank=4, alpha=8), seed=7)
    new = Policy(tiny_model, lora=LoraConfig(rank=4, alpha=8), seed=7)
    assert used.version == new.version == 0 and used.engine.versions() == {0}
    ours, theirs = (lora.trained_parameters(policy.model) for policy in (used, new))
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert used.fresh_seed() == new.fresh_seed()
    assert generations(used, 0) == generations(new, 0)
    for policy in (used, new):
        move_adapter(policy)
        assert policy.publish() == 1
    assert generations(used, 1) == generations(new, 1) != generations(new, 0)
    for policy in (used, new):
        policy.close()


def test_a_server_that_was_started_for_less_is_not_given_a_larger_rank(scripted):
    policy = scripted(answer)
    policy.engine.max_rank = 16
    policy.start_over(LoraConfig(rank=16))
    with pytest.raises(UserError, match="at most 16"):
        policy.start_over(LoraConfig(rank=32))


@pytest.mark.slow
def test_the_best_settings_reproduce_the_best_score(scripted, tmp_path):
    policy = scripted(answer)
    result = tuned(policy, tmp_path / "study", trials=3, values=TRAINING)
    settings = settled(FSTConfig(), read_settings(tmp_path / "study" / "best.json"))
    assert settings.config == result.best_config and settings.lora == result.best_lora
    alone = fresh(policy, settings)
    compiled = FST(metric, config=settings.config, run_dir=tmp_path / "again").compile(
        student_of(alone), trainset=TRAIN, valset=VAL
    )
    assert compiled.detailed_results.result["val_score_after"] == result.best_score
    alone.close()


@pytest.mark.next
def test_memory_stays_flat_over_thirty_trials(scripted, tmp_path):
    """One worker, one policy, adapters of three ranks: after a warm-up, resident memory does not grow with trials."""
    policy = scripted(answer)
    policy.engine.requests = Forgotten()
    process, sizes, adapters_left = psutil.Process(), [], []

    run_trials = api.run_trials

    def measured():
        gc.collect()
        sizes.append(process.memory_info().rss / 2**20)
        adapters_left.append(set(policy.model.peft_config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "run_trials", partial(run_trials, on_trial=measured))
        values = {**TRAINING, "budget.max_rollouts": 9}
        result = tuned(policy, tmp_path, trials=30, values=values, sampler="random", pruner="none")
    assert len(result.summary["trials"]) == len(sizes) == 30
    assert {row["params"]["lora.rank"] for row in result.summary["trials"]} == set(SPACE["lora.rank"]["choices"])
    assert all(left == {"default"} for left in adapters_left)
    thirds = [sorted(sizes[start : start + 10])[5] for start in (0, 10, 20)]
    assert all(after - before < 16 for before, after in pairwise(thirds[1:])), thirds


class Forgotten(list):
    """A list that the scripted engine writes its requests to, and that keeps none."""

    def append(self, _):
        return
