"""Servers that are started here: what is asked of vLLM, what a failed start says, and what is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest

from fst_optimizer import EngineError, Policy, UserError, VLLMConfig, VLLMServer
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import server as vllm_server
from fst_optimizer.errors import EngineDied
from fst_optimizer.testing import move_adapter
from helpers.servers import group, hear_interrupts, need_vllm


@pytest.fixture(autouse=True)
def vllm():
    need_vllm()


def test_flags_given_win_over_the_own_ones(tiny_model):
    config = VLLMConfig(flags=("--dtype", "bfloat16"), max_model_len=512, max_live_versions=3)
    command = VLLMServer(tiny_model, max_lora_rank=9, dtype="float32", config=config).command()
    assert command[-2:] == ["--dtype", "bfloat16"]
    for flag, value in {"--max-lora-rank": "16", "--max-loras": "5", "--max-model-len": "512"}.items():
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert command[command.index("--generation-config") + 1] == "vllm"
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_on_gpus_the_server_shares_memory_with_the_trainer_or_gets_its_own(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_server, "on_cpu", lambda: False)

    def share(**settings):
        command = VLLMServer(tiny_model, config=VLLMConfig(**settings)).command()
        return command[command.index("--gpu-memory-utilization") + 1]

    assert share() == "0.45"
    assert share(devices="1") == "0.9"
    assert share(devices="1", gpu_memory_utilization=0.7) == "0.7"
    server = VLLMServer(tiny_model, config=VLLMConfig(devices="2,3"))
    assert server.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "--no-enable-chunked-prefill" not in server.command()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5: give a share of at most 1"),
        ({"max_live_versions": 2}, "max_live_versions is 2: give a whole number of at least 3"),
        ({"flags": "--enforce-eager"}, "give a list of strings"),
        ({"flags": ("--api-key=abc",)}, "give api_key instead"),
        ({"request_timeout_s": 0}, "vllm.request_timeout_s is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as refused:
        VLLMConfig(**settings)
    assert "abc" not in str(refused.value)


def test_a_start_that_fails_shows_the_end_of_the_log_and_leaves_nothing(tiny_model, tmp_path):
    config = VLLMConfig(flags=("--no-such-flag",), log_file=str(tmp_path / "logs" / "server.log"))
    with pytest.raises(EngineError, match=r"(?s)ended while it started.*unrecognized arguments: --no-such-flag"):
        Policy(tiny_model, engine="vllm", vllm=config)
    assert "--no-such-flag" in (tmp_path / "logs" / "server.log").read_text()


def test_a_start_that_takes_too_long_is_given_up(tiny_model):
    server = VLLMServer(tiny_model, config=VLLMConfig(start_timeout_s=0.5))
    with pytest.raises(EngineError, match=r"did not answer within 0.5 s \(vllm.start_timeout_s\)"):
        server.start()
    assert not server.alive()


def test_a_server_that_is_stopped_while_it_starts_does_not_go_on(tiny_model):
    server = VLLMServer(tiny_model)
    seen = []

    def stop_once(seconds, line):
        if not seen:
            seen.append(group(server.pid))
            threading.Thread(target=server.stop).start()

    server.on_wait = stop_once
    with pytest.raises(EngineError):
        server.start()
    _, alive = psutil.wait_procs(seen[0], timeout=30)
    assert seen[0] and not alive


SCRIPT = """
import sys, time
from fst_optimizer import VLLMServer
server = VLLMServer(sys.argv[1])
server.on_wait = lambda seconds, line: (print(server.pid, flush=True), setattr(server, "on_wait", None))
{body}
"""


FROM_A_THREAD = """
import threading
threading.Thread(target=server.start, daemon=True).start()
time.sleep(1)
raise SystemExit
"""


def test_on_cpu_the_servers_processes_do_not_spin_while_they_wait(vllm_server):
    body = json.dumps({"model": vllm_server.served_name, "prompt": [1, 2, 3], "max_tokens": 2}).encode()
    headers = {"Authorization": f"Bearer {vllm_server.api_key}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{vllm_server.url}/v1/completions", body, headers)).read()

    def cpu_s():
        return sum(sum(process.cpu_times()[:2]) for process in group(vllm_server.pid))

    before = cpu_s()
    time.sleep(0.8)
    assert cpu_s() - before < 0.4  # each of two processes would have spun for all of it


def started_elsewhere(tiny_model, body):
    """A process that starts a server, and the server's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body), str(tiny_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("server.start()", signal.SIGKILL),
        ("server.start()", signal.SIGINT),
        (FROM_A_THREAD, None),
    ],
    ids=["killed", "interrupted", "left"],
)
def test_no_server_outlives_its_parent(tiny_model, body, number):
    process, pid = started_elsewhere(tiny_model, body)
    server = group(pid)
    if number is not None:
        os.kill(process.pid, number)
    process.wait(60)
    _, alive = psutil.wait_procs(server, timeout=30)
    assert server and not alive
    assert not group(pid)


@pytest.fixture(scope="module")
def owned(tiny_model, tmp_path_factory):
    """A policy with a server of its own."""
    need_vllm()
    log = tmp_path_factory.mktemp("log") / "server.log"
    waits = []
    policy = Policy(
        tiny_model,
        engine="vllm",
        vllm=VLLMConfig(log_file=str(log)),
        on_wait=lambda seconds, line: waits.append((seconds, line)),
    )
    policy.waits = waits
    yield policy
    pid = policy.engine.server.pid
    policy.close()
    assert pid is None or not group(pid)


def greedy(policy, version):
    prompt_ids = policy.encode_chat([{"role": "user", "content": "What comes next?"}])
    request = GenerationRequest(prompt_ids, 8, temperature=0.0, version=version)
    return policy.engine.submit(request)


def test_a_policy_starts_its_server_and_says_how_far_it_is(owned):
    assert greedy(owned, 0).result(timeout=60).completion_ids
    assert owned.waits[-1][0] > owned.waits[0][0]
    assert any(line for _, line in owned.waits)


@pytest.mark.parametrize("who", ["server", "worker"])
def test_a_server_that_is_killed_comes_back_with_its_versions(owned, who):
    move_adapter(owned, seed=4)
    version = owned.publish()
    before = {v: greedy(owned, v).result(timeout=60) for v in (0, version)}
    family = group(owned.engine.server.pid)
    leader = next(process for process in family if process.pid == owned.engine.server.pid)
    victim = leader if who == "server" else max(family, key=lambda process: process.create_time())
    victim.send_signal(signal.SIGKILL)
    answers = {v: greedy(owned, v) for v in (0, version)}
    for v, future in answers.items():
        after = future.result(timeout=180)
        assert after.completion_ids == before[v].completion_ids
        assert after.logprobs == pytest.approx(before[v].logprobs, abs=1e-4)
    assert owned.engine.outage_s() > 1
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    owned.retire_all_but(())


def test_three_deaths_in_a_row_end_the_run_with_the_logs_tail(owned):
    server = owned.engine.server
    greedy(owned, 0).result(timeout=60)  # a completion ends any earlier row
    deaths = []

    def kill_again(seconds, line):
        if server.pid and server.pid not in deaths:
            deaths.append(server.pid)
            os.killpg(server.pid, signal.SIGKILL)

    server.on_wait = kill_again
    deaths.append(server.pid)
    os.killpg(server.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"(?s)died 3 times in a row; the end of .*server\.log"):
        greedy(owned, 0).result(timeout=120)
    assert len(deaths) == 3
    with pytest.raises(EngineDied):
        owned.publish()
    with pytest.raises(EngineDied):
        greedy(owned, 0).result(timeout=10)
