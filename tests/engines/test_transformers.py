from concurrent.futures import Future

import pytest

from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.transformers import split_batch
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import EngineContract, make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class TestTransformersEngine(EngineContract):
    @pytest.fixture
    def policy(self, folder):
        policy = Policy(folder)
        yield policy
        policy.close()


def test_the_models_own_sampling_defaults_do_not_shape_the_distribution(folder, tmp_path):
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    defaults = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    defaults |= {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 5.0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(defaults))
    request = GenerationRequest((1, 2, 3, 4), 12, seed=3)
    answers = []
    for place in (folder, tmp_path / "model"):
        policy = Policy(place)
        answers.append(policy.engine.submit(request).result(timeout=120))
        policy.close()
    assert answers[0] == answers[1]


def test_generation_leaves_the_global_random_state_alone(folder):
    import torch

    policy = Policy(folder)
    before = torch.get_rng_state()
    policy.engine.submit(GenerationRequest((1, 2, 3), 4, seed=1)).result(timeout=120)
    assert torch.equal(before, torch.get_rng_state())
    policy.close()


def test_an_engine_that_fails_tells_every_waiting_request_why(folder):
    from fst_optimizer.errors import EngineError

    policy = Policy(folder)
    futures = [policy.engine.submit(GenerationRequest((10**6,), 4)) for _ in range(3)]
    for future in futures:
        with pytest.raises(EngineError, match="generating"):
            future.result(timeout=120)
    assert policy.engine.submit(GenerationRequest((1,), 2)).result(timeout=120).completion_ids
    policy.close()


def queued(*requests):
    return [(request, Future()) for request in requests]


def test_a_batch_holds_one_version_and_keeps_the_others_in_order():
    waiting = queued(*(GenerationRequest((1,), 4, version=version) for version in (1, 0, 1, 2, 0)))
    batch, rest = split_batch(waiting, 10, 1000)
    assert [request.version for request, _ in batch] == [1, 1]
    assert [request.version for request, _ in rest] == [0, 2, 0]


def test_a_batch_stays_within_its_padded_tokens():
    waiting = queued(*(GenerationRequest((1,) * length, 10) for length in (10, 10, 30, 10)))
    batch, rest = split_batch(waiting, 10, 60)
    assert [len(request.prompt_ids) for request, _ in batch] == [10, 10, 10]
    assert [len(request.prompt_ids) for request, _ in rest] == [30]


def test_a_request_larger_than_the_budget_gets_a_batch_of_its_own():
    waiting = queued(GenerationRequest((1,) * 500, 10), GenerationRequest((1,), 1))
    batch, rest = split_batch(waiting, 10, 60)
    assert (len(batch), len(rest)) == (1, 1)
