"""What a GPU changes: generation, the slow step, versions in memory, and one whole run. Skipped without CUDA."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fst_optimizer import FST
from fst_optimizer.config.run import FSTConfig, TrainConfig
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.policy.policy import Policy
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import EngineContract, as_row, make_tiny_model, move_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LETTERS = Path(__file__).parents[2] / "programs" / "letters" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def made(folder, **settings):
    policy = Policy(folder, device="cuda", **settings)
    assert next(policy.model.parameters()).is_cuda
    return policy


class TestTransformersEngineOnCuda(EngineContract):
    @pytest.fixture
    def policy(self, folder):
        policy = made(folder, dtype="float32")
        yield policy
        policy.close()


def sampled(policy, count=16, max_tokens=48, temperature=1.0):
    """Rows of the newest version's own samples."""
    prompts = [f"Sort the letters: {' '.join('hgfedcba'[: 3 + n % 5])}" for n in range(count)]
    requests = [
        GenerationRequest(
            policy.encode_chat([{"role": "user", "content": prompt}]),
            max_tokens,
            temperature,
            seed=seed,
            version=policy.version,
        )
        for seed, prompt in enumerate(prompts)
    ]
    futures = [policy.engine.submit(request) for request in requests]
    return [as_row(*pair) for pair in zip(requests, [future.result(timeout=120) for future in futures], strict=True)]


def distances(policy, rows):
    """Sampler against trainer, in nats, token by token."""
    again = policy.trainer(TrainConfig()).logprobs(rows)
    return [
        abs(a - b) for row, new in zip(rows, again, strict=True) for a, b in zip(row.call.logprobs, new, strict=True)
    ]


def test_in_bfloat16_sampler_and_trainer_agree_to_its_rounding():
    policy = made(LETTERS)
    assert policy.model.dtype == torch.bfloat16
    move_adapter(policy, size=0.02)
    policy.publish()
    far = distances(policy, sampled(policy))
    policy.close()
    assert statistics.mean(far) < 0.02 and max(far) < 0.5, (statistics.mean(far), max(far))


def test_greedy_answers_in_float32_are_those_of_the_cpu():
    requests = [GenerationRequest(tuple(ids), 32, 0.0) for ids in ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16, 17))]
    answers = {}
    for device in ("cpu", "cuda"):
        policy = Policy(LETTERS, device=device, dtype="float32")
        answers[device] = [policy.engine.submit(request).result(timeout=120).completion_ids for request in requests]
        policy.close()
    assert answers["cpu"] == answers["cuda"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_makes_what_was_rewarded_likelier(dtype):
    policy = made(LETTERS, dtype=dtype)
    policy.publish()
    rows = [
        replace(row, advantage=1.0 if place % 2 else -1.0, rollout=place) for place, row in enumerate(sampled(policy))
    ]
    trainer = policy.trainer(TrainConfig(lr=1e-3, warmup_steps=0))
    reports = [trainer.step(rows) for _ in range(5)]
    policy.close()
    assert all(report.updated for report in reports)
    assert reports[-1].advantage_delta > reports[0].advantage_delta
    assert reports[-1].advantage_delta > 0


def test_versions_that_are_retired_leave_no_memory_behind():
    policy = made(LETTERS)

    def turn():
        move_adapter(policy, seed=policy.version)
        policy.retire_all_but({policy.publish()})
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    sizes = [turn() for _ in range(20)]
    policy.close()
    assert sizes[-1] <= sizes[2] * 1.01


def test_a_run_on_the_gpu_learns(tmp_path):
    task = load_task("programs/letters")
    config = task.config().with_values({"budget.max_cycles": 2, "seed": 0})
    assert isinstance(config, FSTConfig)
    policy = made(task.model(), max_tokens=64)
    program = task.build_program()
    program.set_lm(policy.lm)
    fst = FST(task.metric, config=config, run_dir=tmp_path / "run")
    better = fst.compile(program, trainset=task.load("train", 128), valset=task.load("val", 64))
    policy.close()
    result = better.detailed_results.result
    assert result["ended"] == "done" and result["steps"] > 0
    assert result["val_score_after"] > result["val_score_before"]
