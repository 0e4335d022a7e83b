"""A whole run whose vLLM server is killed at the worst moments."""

import json
import os
import signal

import psutil
import pytest

from fst_optimizer import FST, Policy, VLLMConfig
from fst_optimizer.tasks import load_task
from helpers.run_check import assert_as_designed
from helpers.servers import group, need_vllm

STEPS, BATCH, GROUP, CYCLES = 2, 4, 4, 2
CONFIG = {
    "fast": {"population": 2, "anchor_size": 4, "max_rollouts": 24, "max_proposals": 2, "minibatch": 2},
    "rollout": {"group_size": GROUP, "batch_size": BATCH, "num_threads": 16, "timeout_s": 30},
    "train": {"steps_per_cycle": STEPS, "lr": 1e-3, "warmup_steps": 0},
    "eval": {"kl_examples": 4},
    "budget": {"max_cycles": CYCLES},
}


class Killer:
    """Kills the server in the first fast round, while a step's rollouts run, and between them and the update."""

    def __init__(self, policy):
        self.policy = policy
        self.killed = {}
        self.victims = []

    def __call__(self, event):
        if event["kind"] != "progress":
            return
        half, last = event["done"] == event["total"] // 2, event["done"] == event["total"]
        if event["phase"] == "fast" and event["done"] == 2:
            self.kill("a fast round")
        elif event["phase"] == "slow" and half:
            self.kill("a step's rollouts")
        elif event["phase"] == "slow" and last and "a step's rollouts" in self.killed:
            self.kill("an update")

    def kill(self, where):
        server = self.policy.engine.server
        if where not in self.killed and server.pid and server.pid not in self.killed.values():
            self.killed[where] = server.pid
            self.victims += group(server.pid)
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_run_survives_the_death_of_its_server_at_every_stage(tmp_path):
    need_vllm()
    task = load_task("programs/letters")
    policy = Policy(task.model(), engine="vllm", max_tokens=48, vllm=VLLMConfig(log_file=str(tmp_path / "vllm.log")))
    killer = Killer(policy)
    program = task.build_program()
    program.set_lm(policy.lm)
    train, val = task.load("train", 16), task.load("val", 8)
    try:
        fst = FST(
            task.metric, config=CONFIG, run_dir=tmp_path / "run", callbacks=[killer], testset=task.load("test", 8)
        )
        better = fst.compile(program, trainset=train, valset=val)
        result = better.detailed_results.result
        last = policy.engine.server.pid
        assert better(**val[0].inputs()) is not None
    finally:
        policy.close()
    assert set(killer.killed) == {"a fast round", "a step's rollouts", "an update"}
    assert len({*killer.killed.values(), last}) == 4
    assert_as_designed(tmp_path / "run")
    assert (result["steps"], result["cycles"], result["ended"]) == (STEPS * CYCLES, CYCLES, "done")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["rollouts"]["slow"] for line in steps] == [BATCH * GROUP * (n + 1) for n in range(STEPS * CYCLES)]
    assert result["rollouts"]["slow"] == BATCH * GROUP * STEPS * CYCLES
    for cycle in range(CYCLES):
        kept = (tmp_path / "run" / "rollouts" / f"cycle-{cycle:06d}.jsonl").read_text().splitlines()
        rollouts = [json.loads(line) for line in kept]
        examples = {}
        for rollout in rollouts:
            examples[rollout["example"]] = examples.get(rollout["example"], 0) + 1
        assert list(examples.values()) == [GROUP] * BATCH
        assert {rollout["outcome"] for rollout in rollouts} <= {"ok", "parse_error", "truncated"}
    _, alive = psutil.wait_procs(killer.victims, timeout=30)
    _, left = psutil.wait_procs(group(last), timeout=10)  # killed processes take a moment to go
    assert not alive and not left
