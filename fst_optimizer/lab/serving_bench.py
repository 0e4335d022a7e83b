"""`fst lab bench --engine vllm`: what the collector costs over raw requests to the same vLLM server.

Three contenders ask one server for the same number of completions, with the same number in flight and the same number
of tokens each, and take turns:

- the collector, which runs whole programs and keeps every token id and log-prob;
- raw requests: the bodies of the very same calls, posted by a bare asyncio client;
- a thread pool over a bare `dspy.Predict` on dspy's own client, which keeps no tokens.

So that every completion has the same length, the task's model is served from a copy whose end token is another: it
never stops by itself, and runs into `max_tokens`. Its first words still answer in the format that dspy parses.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm.client import completion_body
from fst_optimizer.engines.vllm.engine import VLLMEngine
from fst_optimizer.errors import UserError
from fst_optimizer.lab.bench import collecting, take_turns, with_max_tokens
from fst_optimizer.types import Call

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.tasks import Task


def serving_bench(
    task: Task, policy: Policy, config: FSTConfig, *, examples: int = 32, repeats: int = 5
) -> dict[str, Any]:
    """All measurements, medians over `repeats`. `config.rollout.num_threads` calls are in flight.

    Every call samples `policy.max_tokens` tokens, whatever the task's program asks for.
    """
    engine = policy.engine
    if not isinstance(engine, VLLMEngine) or engine.server is None:
        raise UserError("engine is not an own vLLM server: this bench sends its requests to the server directly")
    policy.publish()
    collect = collecting(task, policy, config, examples, policy.max_tokens)
    rollouts = collect()
    calls = [call for rollout in rollouts for call in rollout.calls]
    in_flight = config.rollout.num_threads
    bodies = _bodies(engine, policy, calls)
    bare = _bare_predict(task, policy, engine, len(calls), in_flight)
    turns = take_turns({"collect": collect, "raw": lambda: _post_all(engine, bodies, in_flight), "bare": bare}, repeats)
    per_s = {name: len(calls) / turn.seconds for name, turn in turns.items()}
    cpu_ms = {name: 1e3 * turn.cpu_s / len(calls) for name, turn in turns.items()}
    return {
        "task": task.name,
        "rollouts": len(rollouts),
        "calls": len(calls),
        "tokens_per_call": statistics.mean(len(call.completion_ids) for call in calls),
        "in_flight": in_flight,
        "collect_calls_per_s": per_s["collect"],
        "raw_calls_per_s": per_s["raw"],
        "bare_predict_calls_per_s": per_s["bare"],
        "collect_over_raw": per_s["collect"] / per_s["raw"],
        "bare_predict_over_raw": per_s["bare"] / per_s["raw"],
        "collect_cpu_ms_per_call": cpu_ms["collect"],
        "raw_cpu_ms_per_call": cpu_ms["raw"],
        "bare_predict_cpu_ms_per_call": cpu_ms["bare"],
        **_publishing(policy),
    }


def endless_copy(model: Path, folder: Path) -> Path:
    """A copy of a model folder whose end token is its padding token, which it was never taught to say."""
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": settings["pad_token_id"]}))
    tokenizer["eos_token"] = tokenizer["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def _bodies(engine: VLLMEngine, policy: Policy, calls: Sequence[Call]) -> list[bytes]:
    """The calls as the engine posted them, under other seeds."""
    name, limit = engine.adapter(policy.version).name, policy.max_tokens
    requests = [
        GenerationRequest(call.prompt_ids, limit, call.temperature, seed=seed) for seed, call in enumerate(calls)
    ]
    return [json.dumps(completion_body(name, request, engine.end_ids)).encode() for request in requests]


def _post_all(engine: VLLMEngine, bodies: Sequence[bytes], in_flight: int) -> None:
    """Post everything and read every answer, with nothing around it."""
    import aiohttp

    assert engine.server is not None
    url = f"{engine.server.url}/v1/completions"
    headers = {"Authorization": f"Bearer {engine.server.api_key}", "Content-Type": "application/json"}

    async def everything() -> None:
        places = asyncio.Semaphore(in_flight)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

            async def one(body: bytes) -> None:
                async with places, session.post(url, data=body) as answer:
                    json.loads(await answer.read())

            await asyncio.gather(*map(one, bodies))

    asyncio.run(everything())


def _bare_predict(task: Task, policy: Policy, engine: VLLMEngine, calls: int, in_flight: int) -> Callable[[], None]:
    """As many calls of the program's first predictor, by dspy's own client in a thread pool."""
    import dspy

    assert engine.server is not None
    lm = dspy.LM(
        f"hosted_vllm/{engine.adapter(policy.version).name}",
        api_base=f"{engine.server.url}/v1",
        api_key=engine.server.api_key,
        temperature=1.0,
        max_tokens=policy.max_tokens,
        cache=False,
    )
    predictor = with_max_tokens(task.build_program(), policy.max_tokens).predictors()[0]
    names = list(predictor.signature.input_fields)
    inputs = [{name: example.inputs().toDict().get(name, "a b c") for name in names} for example in task.load("train")]
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)

    def ask(index: int) -> None:
        with dspy.context(lm=lm, adapter=adapter, disable_history=True, trace=[]):
            try:
                predictor(**inputs[index % len(inputs)])
            except Exception:
                return  # an answer that cannot be parsed has been sampled all the same

    def everything() -> None:
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(ask, range(calls)))

    return everything


def _publishing(policy: Policy, times: int = 5) -> dict[str, float]:
    """Milliseconds from the end of an optimizer step to the new version being served, and to its first token."""
    served, answered = [], []
    for _ in range(times + 1):
        started = time.perf_counter()
        version = policy.publish()
        served.append(time.perf_counter() - started)
        policy.engine.submit(GenerationRequest((1, 2, 3), 1, version=version)).result()
        answered.append(time.perf_counter() - started)
        policy.retire_all_but({version})
    return {
        "step_done_to_served_ms": 1e3 * statistics.median(served[1:]),
        "step_done_to_first_token_ms": 1e3 * statistics.median(answered[1:]),
    }
