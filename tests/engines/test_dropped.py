"""Policies that are dropped without `close`, and processes that are forked from the one that made a policy."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref

import dspy
import psutil
import pytest

from fst_optimizer import EngineError, Policy
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import server as vllm_server
from fst_optimizer.engines.vllm.server import VLLMServer
from fst_optimizer.testing import ScriptedEngine, chat_answer, move_adapter
from helpers.hostile import LikeVLLM
from helpers.servers import group, need_vllm

REQUEST = GenerationRequest((1, 2, 3), 4, seed=1)


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def gone(what, timeout_s=60.0):
    """Whether nothing of this is left, which may take a moment."""
    deadline = time.monotonic() + timeout_s
    while what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not what()


def used(policy):
    """Ask the policy as programs do, publish and retire versions; what would be left of it."""
    with dspy.context(trace=[], disable_history=True):
        policy.lm("a")
        policy.lm_at(0)("a")
        policy.base_lm("a")
    move_adapter(policy)
    policy.publish()
    policy.publish()
    policy.retire_all_but({2})
    policy.engine.submit(REQUEST).result(timeout=60)
    model = policy.model
    return [weakref.ref(one) for one in (policy, policy.engine, model, model.get_input_embeddings().weight)]


def dropped(make):
    """Whether a policy that is made, used and dropped is freed."""
    left = used(make())
    gc.collect()
    return gone(lambda: [one for one in left if one() is not None] and gc.collect() is not None)


def test_a_policy_that_is_dropped_is_freed_and_its_thread_ends(tiny_model):
    before = threads("fst-engine")
    assert dropped(lambda: Policy(tiny_model, max_tokens=4))
    assert gone(lambda: set(threads("fst-engine")) - set(before))


def test_policies_that_are_dropped_one_after_the_other_leave_no_memory(tiny_model):
    def make():
        policy = Policy(tiny_model, max_tokens=4)
        policy.ballast = bytearray(b"1") * (40 << 20)
        return policy

    memory = psutil.Process().memory_info
    assert dropped(make)
    before = memory().rss
    for _ in range(6):
        assert dropped(make)
    assert memory().rss - before < 120 << 20


def test_dspys_own_trace_keeps_a_policy_until_it_is_emptied(tiny_model):
    policy = Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, lambda *_: chat_answer(answer="yes")))
    program = dspy.Predict("question -> answer")
    program.set_lm(policy.lm)
    program(question="why")  # outside of dspy.context(trace=[])
    left = weakref.ref(policy)
    del policy, program
    gc.collect()
    assert left() is not None
    dspy.settings.trace.clear()
    gc.collect()
    assert left() is None


def test_a_request_under_way_keeps_its_engine(tiny_model):
    future = Policy(tiny_model).engine.submit(REQUEST)
    gc.collect()
    assert future.result(timeout=60).completion_ids


def test_a_policy_on_anothers_server_that_is_dropped_takes_its_adapters_along(tiny_model):
    server = LikeVLLM(tiny_model)
    folders = []

    def attached():
        policy = Policy(tiny_model, engine="vllm", url=server.url, max_tokens=4)
        folders.append(policy.engine.adapter(0).parent)
        return policy

    before = threads("fst-vllm")
    assert dropped(attached)
    assert gone(lambda: set(threads("fst-vllm")) - set(before))
    assert not folders[0].exists()
    loaded, unloaded = server.asked["/v1/load_lora_adapter"], server.asked["/v1/unload_lora_adapter"]
    assert loaded == unloaded == 4  # the base, the one that attaching tries, and two versions
    server.close()


@pytest.mark.vllm
def test_a_server_of_a_policy_that_is_dropped_is_stopped(tiny_model):
    need_vllm()
    pids = []

    def own():
        policy = Policy(tiny_model, engine="vllm", max_tokens=4)
        pids.append(policy.engine.server.pid)
        assert group(pids[0])
        return policy

    assert dropped(own)
    assert gone(lambda: group(pids[0]))


FORK = """
import json, os, sys
from fst_optimizer import EngineError, Policy
policy = Policy(sys.argv[1], max_tokens=4, **json.loads(sys.argv[2]))
policy.lm("a")
pid = os.fork()
if not pid:
    told = []
    for call in (lambda: policy.lm("a"), policy.publish, policy.close):
        try:
            call()
            told.append("none")
        except Exception as error:
            told.append(f"{type(error).__name__} {error}")
    print(json.dumps(told), flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0
policy.lm("a")  # the child's close took nothing from here
policy.close()
print("parent done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_call_in_a_forked_process_is_an_error_that_says_so(tiny_model, engine):
    server = LikeVLLM(tiny_model) if engine == "vllm" else None
    settings = {"engine": "vllm", "url": server.url} if server else {}
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_model), json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if server:
        server.close()
    assert ended.returncode == 0, ended.stderr
    child, parent = ended.stdout.splitlines()
    called, published, closed = json.loads(child)
    for told in (called, published):
        assert "forked from it: its engine runs there alone; make a Policy in this process" in told
    assert "EngineError" in published
    assert (closed, parent) == ("none", "parent done")


SLEEPER = "import time; time.sleep(600)"


def test_a_forked_process_does_not_hold_a_server_that_its_parent_stops(monkeypatch, tmp_path):
    """A fork has the pipe too whose end tells the supervisor to stop."""
    monkeypatch.setattr(vllm_server, "check_version", lambda: None)
    monkeypatch.setattr(VLLMServer, "command", lambda self: [sys.executable, "-c", SLEEPER])
    monkeypatch.setattr(VLLMServer, "healthy", lambda self, timeout_s=5.0: self.pid is not None)
    server = VLLMServer("some/model")
    server.start()
    pid, child = server.pid, os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    started = time.monotonic()
    server.stop()
    took_s = time.monotonic() - started
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not group(pid)
    assert took_s < vllm_server.supervisor.GRACE_S


def test_the_error_of_a_forked_process_is_an_engine_error():
    from fst_optimizer.engines.base import check_process

    check_process(os.getpid())
    with pytest.raises(EngineError, match=rf"made in process 1, and this is {os.getpid()}, forked from it"):
        check_process(1)
