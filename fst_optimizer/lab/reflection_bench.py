"""`fst lab bench --reflection-s 3`: a fast round with a slow reflection LM, one proposal at a time against several.

The reflection LM is a server on the loopback with an OpenAI-like endpoint: its latency is all that is made up. The
rollouts are the task's own, on the policy's engine. The server's texts are new and say nothing of the task, so that
both contenders try the same number of proposals.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflect import LMReflector
from fst_optimizer.evolve.round import FastRound, evolve
from fst_optimizer.finished.score import collector_of
from fst_optimizer.lab.bench import take_turns
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.rollout.groups import fast_requests
from fst_optimizer.types import Candidate, Population, Rollout, items_of

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.evolve.budget import Wanted
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.tasks import Task


class SlowAnswers:
    """A server on the loopback that answers chat requests as OpenAI's does, each after `seconds`.

    `answer` gets the request's number, from 1 on, and its prompt; it returns the text, or a status to fail with.
    """

    def __init__(self, seconds: float, answer: Callable[[int, str], str | int]) -> None:
        self.prompts: list[str] = []
        """Of all requests, in the order in which they came."""
        self.most = 0
        """The most requests that were in flight at once."""
        self._in_flight = 0
        self._lock = threading.Lock()
        slow = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = str(body["messages"][-1]["content"])
                number = slow._begin(prompt)
                time.sleep(seconds)
                said = answer(number, prompt)
                slow._end()
                status = said if isinstance(said, int) else 200
                reply = _error(status) if isinstance(said, int) else _completion(said, len(prompt.split()))
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: every request would be a line on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _begin(self, prompt: str) -> int:
        with self._lock:
            self.prompts.append(prompt)
            self._in_flight += 1
            self.most = max(self.most, self._in_flight)
            return len(self.prompts)

    def _end(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def __enter__(self) -> SlowAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def lm(self) -> Any:
        """A `dspy.LM` on this server, asked once for each answer."""
        import dspy

        return dspy.LM("openai/slow-answers", api_base=self.url, api_key="none", cache=False, num_retries=0)


def _completion(text: str, prompt_tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    used = {"prompt_tokens": prompt_tokens, "completion_tokens": len(text.split())}
    return {
        "id": "one",
        "object": "chat.completion",
        "created": 0,
        "model": "slow-answers",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {**used, "total_tokens": sum(used.values())},
    }


def _error(status: int) -> dict[str, Any]:
    return {"error": {"message": f"status {status}", "type": "server_error"}}


def numbered(number: int, prompt: str) -> str:
    """A new text that says nothing of the task."""
    return f"```\nAnswer, attempt {number}.\n```"


def reflection_bench(
    task: Task, policy: Policy, config: FSTConfig, *, reflection_s: float, examples: int = 32, repeats: int = 3
) -> dict[str, Any]:
    """Seconds of a fast round from the task's own instructions, medians over `repeats`, the contenders taking turns.

    Raises:
        UserError: there is nothing to compare with, as no proposals are in flight together.
    """
    in_flight = config.fast.parallel_proposals
    if in_flight == 1:
        raise UserError("fast.parallel_proposals is 1: give more to compare with, e.g. --set fast.parallel_proposals=8")
    rounds: dict[int, list[FastRound]] = {1: [], in_flight: []}
    most: dict[int, int] = {}

    def one_round(count: int) -> None:
        with SlowAnswers(reflection_s, numbered) as server:
            changed = config.with_values({"fast.parallel_proposals": count, "fast.patience": 0})
            rounds[count].append(fast_round(task, policy, changed, LMReflector(server.lm()), examples))
            most[count] = server.most

    contenders = {str(count): partial(one_round, count) for count in rounds}
    turns = take_turns(contenders, repeats)
    after, before = turns[str(in_flight)].seconds, turns["1"].seconds
    return {
        "task": task.name,
        "reflection_s": reflection_s,
        "parallel_proposals": in_flight,
        "most_in_flight": most[in_flight],
        "proposals": [statistics.median(one.proposals for one in rounds[count]) for count in rounds],
        "rollouts": [statistics.median(one.rollouts for one in rounds[count]) for count in rounds],
        "round_s_one_by_one": before,
        "round_s_in_flight": after,
        "in_flight_over_one_by_one": after / before,
    }


def fast_round(task: Task, policy: Policy, config: FSTConfig, reflector: LMReflector, examples: int) -> FastRound:
    """One fast round at the policy's newest version, from the task's own instructions."""
    program = task.build_program()
    program.set_lm(policy.lm)
    program = attach_policy(program, policy)
    collector = collector_of(program, policy, task.metric, config)
    seed, asked, temperature = Candidate(seed_texts(program)), Counter[tuple[str, str]](), config.fast.temperature
    items = items_of(task.load("train", examples), "train")
    anchor = random.Random(config.seed).sample(items, min(config.fast.anchor_size, len(items)))

    def score(wanted: Wanted, *, capture: bool) -> Sequence[Rollout]:
        requests = [one for pair in wanted for one in fast_requests(*pair, temperature, 0, asked)]
        return collector.run(requests, version=policy.version, temperature=temperature, capture=capture)

    return evolve(
        Population((seed,), policy.version),
        score,
        anchor,
        reflector,
        config.fast,
        policy_version=policy.version,
        cycle=0,
        seed=config.seed,
        components=tuple(seed.texts),
        count_tokens=policy.count_tokens,
        root=seed,
    )
