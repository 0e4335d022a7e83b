"""Against a real vLLM server: one on a tiny random model, which every test attaches to with a policy of its own."""

import json
import os
import threading
import time

import pytest

from fst_optimizer import EngineError, Policy, UserError, VLLMConfig
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import engine as vllm_engine
from fst_optimizer.testing import EngineContract, as_row, make_tiny_model, move_adapter
from helpers.servers import Proxy
from soak import versions


@pytest.fixture
def attach(vllm_server, tiny_model):
    """Makes policies on the server, or on a proxy in front of it."""
    made = []

    def make(url=None, *, model=tiny_model, api_key=vllm_server.api_key, **settings):
        policy = Policy(model, engine="vllm", url=url or vllm_server.url, api_key=api_key, **settings)
        made.append(policy)
        return policy

    yield make
    for policy in made:
        policy.close()


@pytest.fixture
def proxied(vllm_server):
    """Makes proxies in front of the server."""
    made = []

    def make(answer):
        made.append(Proxy(vllm_server.url, answer))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


class TestVLLMEngine(EngineContract):
    @pytest.fixture
    def policy(self, attach):
        return attach()


def ask(policy, version=0, *, text="Sort the letters: d c b a", tokens=12, **settings):
    prompt_ids = policy.encode_chat([{"role": "user", "content": text}])
    request = GenerationRequest(prompt_ids, tokens, **{"temperature": 1.0, "version": version, **settings})
    return request, policy.engine.submit(request).result(timeout=120)


def far(policy, version, request, generation):
    """The largest difference between the server's log-probs and the trainer's, in nats."""
    row = as_row(request, generation)
    trained = policy.logprobs_of([row.call], policy.tensors(version) if version else None)[0]
    return max(abs(a - b) for a, b in zip(generation.logprobs, trained, strict=True))


def test_both_engines_decode_the_same_tokens_greedily_with_the_same_logprobs(attach, tiny_model):
    ours, theirs = Policy(tiny_model), attach()
    for policy in (ours, theirs):
        move_adapter(policy, seed=3)
        policy.publish()
    for version in (0, 1):
        for text in EngineContract.PROMPTS:
            _, a = ask(ours, version, text=text, temperature=0.0, tokens=24)
            _, b = ask(theirs, version, text=text, temperature=0.0, tokens=24)
            assert a.completion_ids == b.completion_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
    ours.close()


def test_a_prompt_cached_under_one_version_is_computed_again_under_the_next(attach):
    policy = attach()
    text = "The same long beginning of a prompt. " * 12
    for seed in (1, 2, 3):
        move_adapter(policy, seed=seed)
        version = policy.publish()
        for asked in (version, version - 1, version):
            request, generation = ask(policy, asked, text=text, seed=seed)
            assert far(policy, asked, request, generation) < 1e-3


def test_a_version_number_that_comes_back_with_other_weights_is_not_served_from_the_cache(attach):
    policy = attach()
    text = "The same long beginning of a prompt. " * 12
    for seed in (1, 2):
        move_adapter(policy, seed=seed)
        policy.continue_numbers_from(6)
        assert policy.publish() == 7
        request, generation = ask(policy, 7, text=text, seed=5)
        assert far(policy, 7, request, generation) < 1e-3
        policy.retire_all_but(())


def test_prefix_caching_is_on(attach, vllm_server):
    policy = attach()
    text = "A beginning that nobody else asks with. " * 12
    before = hits(vllm_server)
    for seed in range(2):
        ask(policy, text=text, seed=seed)
    assert hits(vllm_server) > before


def hits(server):
    import urllib.request

    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.api_key}"})
    lines = urllib.request.urlopen(request).read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def test_no_more_versions_are_alive_than_the_server_has_room_for(attach):
    policy = attach(vllm=VLLMConfig(max_live_versions=3))
    for _ in range(3):
        policy.publish()
    with pytest.raises(EngineError, match=r"1, 2, 3 are served.*max_live_versions \(3\)"):
        policy.publish()
    policy.retire_all_but({3})
    assert policy.publish() == 5
    assert policy.engine.versions() == {0, 3, 5}


def test_retiring_waits_for_the_versions_requests(attach):
    policy = attach()
    move_adapter(policy)
    version = policy.publish()
    prompt_ids = policy.encode_chat([{"role": "user", "content": "a"}])
    futures = [policy.engine.submit(GenerationRequest(prompt_ids, 60, seed=i, version=version)) for i in range(16)]
    policy.retire_all_but(())
    assert all(future.done() and future.result().completion_ids for future in futures)


def test_requests_that_do_not_end_are_cancelled_when_their_version_is_retired(attach, proxied, monkeypatch):
    monkeypatch.setattr(vllm_engine, "DRAIN_S", 0.05)
    held, go_on = threading.Semaphore(0), threading.Event()

    def hold(path, count):
        if path == "/v1/completions" and 2 < count <= 10:  # the first two are the check on attaching
            held.release()
            go_on.wait(60)

    policy = attach(proxied(hold).url)
    version = policy.publish()
    prompt_ids = policy.encode_chat([{"role": "user", "content": "a"}])
    futures = [policy.engine.submit(GenerationRequest(prompt_ids, 30, seed=i, version=version)) for i in range(8)]
    for _ in futures:
        assert held.acquire(timeout=60)
    policy.retire_all_but(())
    assert all(future.cancelled() for future in futures)
    go_on.set()  # what was on its way arrives late, and finds its adapter unloaded
    assert ask(policy)[1].completion_ids  # the server lives


def test_files_outlive_the_unloading_of_their_version(attach, monkeypatch):
    policy = attach()
    version = policy.publish()
    folder = policy.engine.adapter(version)
    monkeypatch.setattr(vllm_engine, "LINGER_S", 1.0)
    policy.retire_all_but(())
    assert (folder / "adapter_model.safetensors").is_file()
    newest = policy.publish()
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()
    assert policy.engine.adapter(newest).exists()


def test_closing_unloads_what_was_published_and_deletes_the_files(attach, vllm_server):
    policy = attach()
    policy.publish()
    adapter = policy.engine.adapter(1)
    name, folder = adapter.name, adapter.parent
    assert name in names(vllm_server)
    policy.close()
    assert name not in names(vllm_server)
    assert not folder.exists()


def names(server):
    import urllib.request

    request = urllib.request.Request(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {server.api_key}"})
    return [model["id"] for model in json.loads(urllib.request.urlopen(request).read())["data"]]


def test_versions_come_and_go_without_the_servers_memory_growing(attach, vllm_server):
    policy = attach()
    seen = [versions.publish(policy, vllm_server.pid, seed) for seed in range(5)]
    assert versions.faults(seen) == []
    assert policy.engine.versions() == {0, 4, 5}


def test_a_request_for_a_file_that_someone_deleted_does_not_reach_the_server(attach):
    policy = attach()
    policy.publish()
    policy.retire_all_but(())
    with pytest.raises(EngineError, match="version 1 is not served any more"):
        ask(policy, 1)


# -- attaching ----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_plainly(attach):
    with pytest.raises(UserError, match="401"):
        attach(api_key="wrong")


def test_another_base_model_is_found_out(attach, tmp_path):
    with pytest.raises(UserError, match="another base model"):
        attach(model=make_tiny_model(tmp_path / "other", seed=1))


def test_a_server_that_loads_no_adapters_is_told_how_to_restart(attach, proxied):
    proxy = proxied(lambda path, _: (404, {}, b'{"detail":"Not Found"}') if path == "/v1/load_lora_adapter" else None)
    with pytest.raises(UserError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve .*--max-lora-rank 16"):
        attach(proxy.url)


def test_a_server_without_token_ids_is_refused(attach, proxied):
    answer = json.dumps({"choices": [{"text": "a", "logprobs": {"token_logprobs": [-0.1]}}]}).encode()
    proxy = proxied(lambda path, _: (200, {}, answer) if path == "/v1/completions" else None)
    with pytest.raises(UserError, match="no token ids"):
        attach(proxy.url)


def test_raw_logprobs_are_told_from_processed_ones(attach, proxied, vllm_server):
    """What a server with --logprobs-mode raw_logprobs answers: the log-probs at temperature 1."""
    policy = attach()

    def raw(path, count):
        if path != "/v1/completions" or count > 1:
            return None
        request, generation = ask(policy, text="Write a short list of words.", tokens=8, temperature=0.5, seed=1)
        at_one = as_row(GenerationRequest(request.prompt_ids, 8, temperature=1.0), generation)
        logprobs = policy.logprobs_of([at_one.call], None)[0]
        choice = {
            "token_ids": generation.completion_ids,
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": generation.finish_reason,
        }
        model = json.loads(proxy.bodies[-1])["model"]
        return 200, {}, json.dumps({"model": model, "choices": [choice]}).encode()

    proxy = proxied(raw)
    with pytest.raises(UserError, match="raw_logprobs"):
        attach(proxy.url)


# -- requests -----------------------------------------------------------------------------------------------------


def test_seeds_of_any_size_are_taken(attach):
    policy = attach()
    assert ask(policy, seed=2**64 - 1)[1].completion_ids


def test_a_refused_request_says_why_and_the_next_one_is_answered(attach):
    policy = attach()
    with pytest.raises(EngineError, match="400"):
        policy.engine.submit(GenerationRequest((10**6,), 4)).result(timeout=60)
    assert ask(policy)[1].completion_ids


def test_training_moves_what_the_server_serves(attach):
    policy = attach()
    trainer = policy.trainer(TrainConfig(lr=1e-2, warmup_steps=0))
    request, generation = ask(policy, tokens=6)
    before = sum(generation.logprobs)
    for _ in range(3):
        trainer.step([as_row(request, generation)])
    version = policy.publish()
    _, after = ask(policy, version, tokens=6)
    trained = policy.logprobs_of([as_row(request, generation).call], policy.tensors(version))[0]
    assert sum(trained) > before
    assert far(policy, version, request, after) < 1e-3


def test_what_others_may_reach_needs_the_key(vllm_server):
    import urllib.error
    import urllib.request

    more = ("/inference/v1/generate", "/version", "/ping", "/docs")
    for path in ("/v1/models", "/adapters", "/invocations", "/metrics", *more):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(vllm_server.url + path)
        assert refused.value.code == 401
    assert urllib.request.urlopen(f"{vllm_server.url}/health").status == 200
    command = " ".join(vllm_server.command())
    assert vllm_server.api_key not in command
    assert vllm_server.api_key not in vllm_server.log_file.read_text()
    assert "127.0.0.1" in command
    assert os.environ.get("VLLM_API_KEY") != vllm_server.api_key


def test_a_policy_that_starts_over_serves_other_adapters_under_the_same_numbers(attach):
    policy = attach(lora=LoraConfig(rank=16, alpha=32))
    move_adapter(policy, seed=1)
    policy.publish()
    _, before = ask(policy, 1, seed=5)
    policy.start_over(LoraConfig(rank=8, alpha=8), seed=3)
    assert policy.engine.versions() == {0}
    request, base = ask(policy, 0, seed=5)
    assert far(policy, 0, request, base) < EngineContract.TOLERANCE
    move_adapter(policy, seed=2)
    assert policy.publish() == 1
    request, after = ask(policy, 1, seed=5)
    assert far(policy, 1, request, after) < EngineContract.TOLERANCE
    assert len({before.completion_ids, after.completion_ids, base.completion_ids}) == 3
    policy.retire_all_but(())
    assert policy.engine.versions() == {0}
