"""`fst lab bench`: ratios measured in one run, since absolute times mean little on shared machines.

- rollouts through the collector against raw batched `generate` on the same prompts (aim: 0.7 or more);
- tokens through the slow step against TRL's GRPOTrainer on the same rows and model (aim: 1 or more);
- how far the trainer's log-probs are from the sampler's; milliseconds to publish a version; peak memory, ours alone and
  with TRL, which loads vLLM where that is installed.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.finished.score import collector_of
from fst_optimizer.policy.policy import Policy
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.rollout.credit import credit
from fst_optimizer.rollout.groups import grouped
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.types import Candidate, Rollout, TrainRow, items_of

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.tasks import Task


def bench(task: Task, policy: Policy, config: FSTConfig, *, examples: int = 64, repeats: int = 5) -> dict[str, Any]:
    """All measurements, medians over `repeats`, each pair of contenders taking turns."""
    policy.publish()  # version 1 equals the base, but pays for its adapter as every later version does
    collect = collecting(task, policy, config, examples)
    rollouts, collect_s, raw_s = _rollout_times(policy, collect, config, repeats)
    rows = credit(grouped(rollouts), config).rows
    ours_s, trl_s, ours_mib = _step_times(policy, rows, config.train, repeats)
    prompt_and_completion = sum(len(row.call.prompt_ids) + len(row.call.completion_ids) for row in rows)
    calls = sum(len(rollout.calls) for rollout in rollouts)
    return {
        "task": task.name,
        "rollouts": len(rollouts),
        "calls": calls,
        "rows": len(rows),
        "collect_rollouts_per_s": len(rollouts) / collect_s,
        "raw_generate_rollouts_per_s": len(rollouts) / raw_s,
        "collect_over_raw": raw_s / collect_s,
        "slow_step_tokens_per_s": prompt_and_completion / ours_s,
        "trl_step_tokens_per_s": None if trl_s is None else prompt_and_completion / trl_s,
        "slow_step_over_trl": None if trl_s is None else trl_s / ours_s,
        "logprob_difference_max": _logprob_difference(policy, rows, config.train),
        "publish_ms": 1e3 * take_turns({"publish": policy.publish}, 5)["publish"].seconds,
        "peak_memory_ours_mib": ours_mib,
        "peak_memory_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    """The most memory that this process has had until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def collecting(
    task: Task, policy: Policy, config: FSTConfig, examples: int, max_tokens: int | None = None
) -> Callable[[], list[Rollout]]:
    """Runs the task's seed program G times an example, at the version that is the newest then.

    `max_tokens` overrides what the program's predictors ask for.
    """
    program = with_max_tokens(task.build_program(), max_tokens)
    program.set_lm(policy.lm)
    program = attach_policy(program, policy)
    collector = collector_of(program, policy, task.metric, config)
    candidate = Candidate(seed_texts(program))
    items = items_of(task.load("train", examples), "train")
    requests = [Request(candidate, item, index) for item in items for index in range(config.rollout.group_size)]
    return lambda: collector.run(requests, version=policy.version, temperature=config.rollout.temperature)


def with_max_tokens(program: dspy.Module, max_tokens: int | None) -> dspy.Module:
    """The program, its predictors asking for this many tokens. None: for as many as they do. In place."""
    if max_tokens is not None:
        for predictor in program.predictors():
            predictor.config["max_tokens"] = max_tokens
    return program


def _rollout_times(
    policy: Policy, collect: Callable[[], list[Rollout]], config: FSTConfig, repeats: int
) -> tuple[list[Rollout], float, float]:
    """The rollouts, seconds to collect them, and seconds of raw `generate` for the same calls in full batches."""
    rollouts = collect()
    sampled = [call for rollout in rollouts for call in rollout.calls]
    most = max(len(call.completion_ids) for call in sampled)
    calls = [
        GenerationRequest(call.prompt_ids, most, call.temperature, (), seed, policy.version)
        for seed, call in enumerate(sampled)
    ]
    size = config.rollout.num_threads

    def raw() -> None:
        for start in range(0, len(calls), size):
            policy.engine.generate(calls[start : start + size])  # type: ignore[attr-defined]

    turns = take_turns({"collect": collect, "raw": raw}, repeats)
    return rollouts, turns["collect"].seconds, turns["raw"].seconds


def _step_times(
    policy: Policy, rows: Sequence[TrainRow], config: TrainConfig, repeats: int
) -> tuple[float, float | None, float]:
    """Seconds of our slow step, and of TRL's on the same rows; the peak memory in MiB before TRL is loaded.

    None for TRL where it is not installed.
    """
    trainer = policy.trainer(config)
    start = policy.tensors(policy.version)
    contenders: dict[str, Callable[[], Any]] = {"ours": lambda: trainer.step(rows)}
    trainer.step(rows)
    ours_mib = _peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("trl"):
            from fst_optimizer.lab.trl_step import TRLStep

            contenders["trl"] = TRLStep(policy, rows, config, folder)
        turns = take_turns(contenders, repeats)
    policy.restore(policy.version, start)
    return turns["ours"].seconds, turns["trl"].seconds if "trl" in turns else None, ours_mib


def _logprob_difference(policy: Policy, rows: Sequence[TrainRow], config: TrainConfig) -> float:
    again = policy.trainer(config).logprobs(rows)
    pairs = zip(rows, again, strict=True)
    return max(abs(a - b) for row, new in pairs for a, b in zip(row.call.logprobs, new, strict=True))


@dataclass(frozen=True)
class Turn:
    """What one turn of a contender took."""

    seconds: float
    cpu_s: float
    """CPU time of this process, a server's not counted."""


def take_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Turn]:
    """The median turn of each, run alternately so that a busy machine slows all alike; the first turns warm up."""
    rounds = [{name: _turn(run) for name, run in contenders.items()} for _ in range(repeats + 1)][1:]
    return {
        name: Turn(
            statistics.median(one[name].seconds for one in rounds), statistics.median(one[name].cpu_s for one in rounds)
        )
        for name in contenders
    }


def _turn(run: Callable[[], Any]) -> Turn:
    cpu_s, started = time.process_time(), time.perf_counter()
    run()
    return Turn(time.perf_counter() - started, time.process_time() - cpu_s)
