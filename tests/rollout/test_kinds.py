"""The programs that people write, on every engine and in every prompt format: who called, what was sampled, who is
credited."""

import json
import re
import threading
import time
from collections import Counter
from typing import Literal

import dspy
import pydantic
import pytest
from dspy.lm15 import Message, Response, TextPart
from dspy.lm15 import Usage as Tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fst_optimizer import Policy
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.credit import credit
from fst_optimizer.rollout.groups import grouped
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.testing import ScriptedEngine
from fst_optimizer.types import Candidate, Outcome, items_of

FORMATS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


class Person(pydantic.BaseModel):
    name: str
    age: int


class Typed(dspy.Signature):
    """Say what is known."""

    question: str = dspy.InputField()
    person: Person = dspy.OutputField()
    mood: Literal["glad", "sad"] = dspy.OutputField()
    numbers: list[int] = dspy.OutputField()


def chain(forward, **parts):
    """A program with these parts and this forward."""

    class Chain(dspy.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Chain.forward = forward
    return Chain()


def lookup(word: str) -> str:
    """Looks a word up."""
    if word == "slow":
        time.sleep(0.05)
    if word == "bad":
        raise ValueError("no such word")
    return f"meaning of {word}"


async def lookup_later(word: str) -> str:
    """Looks a word up."""
    return lookup(word)


class Reverser:
    """An interpreter that runs nothing: its output is the code, backwards."""

    tools = ()

    def start(self):
        pass

    def shutdown(self):
        pass

    def execute(self, code, variables=None):
        return code[::-1]


class Frozen:
    """The engine of an LM that is not trained."""

    def complete(self, request):
        text = written(str(request))
        message = Message.assistant([TextPart(text)])
        return Response(id=None, model="f", message=message, finish_reason="stop", usage=Tokens(input_tokens=1))

    def __deepcopy__(self, memo):
        return self


def frozen_first():
    program = chain(two_in_a_row, first=dspy.Predict("question -> middle"), second=dspy.Predict("middle -> answer"))
    program.first.lm = dspy.LM("hosted_vllm/frozen", engine=Frozen(), cache=False, num_retries=0)
    return program


def two_in_a_row(self, question):
    return self.second(middle=self.first(question=question).middle)


def every_step(self, question):
    for step in self.steps:
        question = step(question=question).answer
    return dspy.Prediction(answer=question)


def by_name(self, question):
    return self.steps["b"](question=self.steps["a"](question=question).answer)


def until_short(self, question):
    """How often it calls depends on the data."""
    while len(question) > 1:
        self.shorten(question=question)
        question = question[1:]
    return self.shorten(question=question)


def in_parallel(self, question):
    pairs = [(self.answer, dspy.Example(question=f"{question}{i}").with_inputs("question")) for i in range(3)]
    # The failing answers of an untrained model are not to stop the batch: the program counts what came back.
    found = dspy.Parallel(num_threads=2, max_errors=10, disable_progress_bar=True, provide_traceback=False)(pairs)
    return dspy.Prediction(answer=str(len([one for one in found if one])))


class OnlyAsync(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("question -> middle"), dspy.Predict("middle -> answer")

    async def aforward(self, question):
        return await self.second.acall(middle=(await self.first.acall(question=question)).middle)


class AsyncAgent(dspy.Module):
    def __init__(self):
        super().__init__()
        self.agent = dspy.ReAct("question -> answer", tools=[lookup_later], max_iters=3)

    async def aforward(self, question):
        return await self.agent.acall(question=question)


def q():
    return dspy.Predict("question -> answer")


def whole(self, question):
    return self.part(question=question)


def agent():
    return dspy.ReAct("question -> answer", tools=[lookup], max_iters=3)


KINDS = {
    # name: (build, predictor -> calls in a rollout where all goes well)
    "predict": (lambda: chain(whole, part=q()), {"part": 1}),
    "two in a row": (
        lambda: chain(two_in_a_row, first=dspy.Predict("question -> middle"), second=dspy.Predict("middle -> answer")),
        {"first": 1, "second": 1},
    ),
    "chain of thought": (
        lambda: chain(whole, part=dspy.ChainOfThought("question -> answer")),
        {"part.predict": 1},
    ),
    "typed": (lambda: chain(whole, part=dspy.Predict(Typed)), {"part": 1}),
    "react": (lambda: chain(whole, part=agent()), {"part.react": 2, "part.extract.predict": 1}),
    "async react": (AsyncAgent, {"agent.react": 2, "agent.extract.predict": 1}),
    "program of thought": (
        lambda: chain(whole, part=dspy.ProgramOfThought("question -> answer", interpreter_factory=Reverser)),
        {"part.code_generate.predict": 1, "part.generate_output.predict": 1},
    ),
    "best of n": (
        lambda: chain(whole, part=dspy.BestOfN(q(), N=3, reward_fn=lambda a, p: 0.0, threshold=1.0)),
        {"part.module": 3},
    ),
    "refine": (
        lambda: chain(whole, part=dspy.Refine(q(), N=2, reward_fn=lambda a, p: 0.0, threshold=1.0)),
        {"part.module": 2, "": 1},  # the advice on the first try comes from a predictor of dspy's own
    ),
    "list": (lambda: chain(every_step, steps=[q(), q(), q()]), {"steps[0]": 1, "steps[1]": 1, "steps[2]": 1}),
    "dict": (lambda: chain(by_name, steps={"a": q(), "b": q()}), {"steps['a']": 1, "steps['b']": 1}),
    "loop": (lambda: chain(until_short, shorten=q()), {"shorten": 4}),
    "parallel": (lambda: chain(in_parallel, answer=q()), {"answer": 3}),
    "async": (OnlyAsync, {"first": 1, "second": 1}),
    "frozen part": (frozen_first, {"second": 1}),
}
ANSWERS = {
    "middle": "m",
    "answer": "a",
    "reasoning": "since",
    "person": json.dumps({"name": "Ada", "age": 36}),
    "mood": "glad",
    "numbers": "[1, 2]",
    "generated_code": "print(1)",
    "discussion": "so",
    "advice": "{}",
    "next_thought": "look",
}


def written(prompt):
    """An answer with every field that any of the programs asks for, in the format that the prompt asks for."""
    seen = "observation_0" in prompt
    fields = {
        **ANSWERS,
        "next_tool_name": "finish" if seen else ("lookup_later" if "lookup_later" in prompt else "lookup"),
        "next_tool_args": "{}" if seen else '{"word": "bad"}',
    }
    asked = [name for name in fields if re.search(rf"\b{name}\b", prompt)]
    if "Respond with a JSON object" in prompt:
        return json.dumps({name: parsed(fields[name]) for name in asked})
    if "## ]]" in prompt:
        return "\n\n".join([*(f"[[ ## {name} ## ]]\n{fields[name]}" for name in asked), "[[ ## completed ## ]]"])
    return "\n".join(f"<{name}>\n{fields[name]}\n</{name}>" for name in asked)


def parsed(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def collected(policy, program, adapter, *, group=2, timeout_s=60):
    for predictor in program.predictors():
        predictor.lm = predictor.lm or policy.lm
    program = attach_policy(program, policy)
    collector = Collector(
        lambda candidate: apply_texts(program, candidate.texts),
        policy,
        Metric(lambda example, prediction, trace=None: 0.5),
        FSTConfig().with_values({"seed": 1, "rollout.num_threads": 4, "rollout.timeout_s": timeout_s}),
    )
    (item,) = items_of([dspy.Example(question="abcd", answer="x").with_inputs("question")], "train")
    requests = [Request(Candidate(seed_texts(program)), item, index) for index in range(group)]
    with dspy.context(adapter=adapter, lm=policy.lm):
        return collector.run(requests, version=policy.version, temperature=1.0)


@pytest.fixture(scope="module")
def scripted_policy(tiny_model):
    def answer(prompt, request):
        return written(prompt)

    policy = Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, answer, context_length=100_000))
    yield policy
    policy.close()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_program_runs_and_each_call_is_its_predictors(scripted_policy, kind, form):
    build, expected = KINDS[kind]
    asked_before = len(scripted_policy.engine.requests)
    rollouts = collected(scripted_policy, build(), FORMATS[form]())
    for rollout in rollouts:
        assert rollout.outcome is Outcome.OK, rollout.error
        assert rollout.score == 0.5
        assert Counter(call.predictor for call in rollout.calls) == expected
    asked = len(scripted_policy.engine.requests) - asked_before
    assert asked == sum(len(rollout.calls) for rollout in rollouts)


@pytest.fixture(scope="module")
def torch_policy(tiny_model):
    policy = Policy(tiny_model, max_tokens=12)
    yield policy
    policy.close()


@pytest.fixture(scope="module")
def vllm_policy(tiny_model, vllm_server):
    policy = Policy(tiny_model, engine="vllm", url=vllm_server.url, api_key=vllm_server.api_key, max_tokens=12)
    yield policy
    policy.close()


REAL = [
    pytest.param(
        *(engine, kind, list(FORMATS)[(place + shift) % len(FORMATS)]),
        marks=[pytest.mark.vllm] if engine == "vllm" else [],
    )
    for shift, engine in enumerate(["torch", "vllm"])
    for place, kind in enumerate(KINDS)
]
"""Pairwise: each engine with every kind and every format. Every kind with every format is the test above."""


@pytest.mark.parametrize(("engine", "kind", "form"), REAL)
def test_on_real_engines_every_call_has_its_exact_tokens_and_is_credited_once(request, engine, kind, form):
    """A random model answers nonsense; programs fail on it, and what was sampled until then counts all the same."""
    policy = request.getfixturevalue(f"{engine}_policy")
    rollouts = collected(policy, KINDS[kind][0](), FORMATS[form]())
    calls = [call for rollout in rollouts for call in rollout.calls]
    assert {rollout.outcome for rollout in rollouts} <= {
        Outcome.OK,
        Outcome.PARSE_ERROR,
        Outcome.TRUNCATED,
        Outcome.PROGRAM_ERROR,
    }
    assert calls and {call.predictor for call in calls} <= set(KINDS[kind][1])
    again = policy.logprobs_of(calls, None)
    for call, row in zip(calls, again, strict=True):
        assert call.logprobs == pytest.approx(row, abs=1e-3)
    # One of the two failed, one did not, as far as credit goes.
    (group,) = grouped(rollouts)
    scored = type(group)(group.example_id, tuple(with_score(r, index) for index, r in enumerate(group.rollouts)))
    rows = credit([scored], FSTConfig()).rows
    assert Counter(id(row.call) for row in rows) == Counter(id(call) for call in calls)


def with_score(rollout, score):
    from dataclasses import replace

    return replace(rollout, outcome=Outcome.OK, score=float(score))


# -- generated programs --------------------------------------------------------------------------------------------

LEAF = st.sampled_from(["call", "thought", "parallel", "loop", "caught", "async"])
TREE = st.recursive(LEAF, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6)


class Generated(dspy.Module):
    """A tree of calls: lists nest modules, leaves call in one way or another."""

    def __init__(self, tree, path="p"):
        super().__init__()
        self.tree = tree
        signature = dspy.Signature("question -> answer", f"I am {path}!")
        if isinstance(tree, list):
            self.parts = [Generated(inner, f"{path}-{place}") for place, inner in enumerate(tree)]
        elif tree == "thought":
            self.part = dspy.ChainOfThought(signature)
        else:
            self.part = dspy.Predict(signature)

    def forward(self, question):
        if isinstance(self.tree, list):
            for part in self.parts:
                question = part(question=question).answer
            return dspy.Prediction(answer=question)
        return getattr(self, f"by_{self.tree}")(question)

    def by_call(self, question):
        return self.part(question=question)

    by_thought = by_call

    def by_parallel(self, question):
        pairs = [(self.part, dspy.Example(question=f"{question}{i}").with_inputs("question")) for i in range(2)]
        found = dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)
        return found[0]

    def by_loop(self, question):
        for _ in range(len(question) % 3 + 1):
            found = self.part(question=question)
        return found

    def by_caught(self, question):
        """The answer to this never parses: the program lives with it."""
        try:
            return self.part(question="FAIL")
        except dspy.utils.exceptions.AdapterParseError:
            return dspy.Prediction(answer="none")

    def by_async(self, question):
        import asyncio

        return asyncio.run(self.part.acall(question=question))


@pytest.fixture(scope="module")
def told(tiny_model):
    """A policy that answers by the prompt, and what it was asked: (the predictor by its instruction, prompt)."""
    asked, lock = [], threading.Lock()

    def answer(prompt, request):
        with lock:
            asked.append((re.findall(r"I am (p[-\d]*)!", prompt)[-1], request.prompt_ids))
        if prompt.rstrip().count("FAIL"):
            return "nothing that parses"
        return f"[[ ## reasoning ## ]]\nso\n\n[[ ## answer ## ]]\n{request.seed % 10}\n\n[[ ## completed ## ]]"

    policy = Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, answer, context_length=100_000))
    yield policy, asked
    policy.close()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREE)
def test_every_call_of_a_generated_program_is_credited_once_to_the_right_predictor(told, tree):
    policy, asked = told
    asked.clear()
    program = Generated(tree)
    names = {p.signature.instructions.removeprefix("I am ").rstrip("!"): n for n, p in program.named_predictors()}
    rollouts = collected(policy, program, dspy.ChatAdapter(use_json_adapter_fallback=False))
    assert [rollout.outcome for rollout in rollouts] == [Outcome.OK, Outcome.OK], rollouts[0].error
    calls = [call for rollout in rollouts for call in rollout.calls]
    # What the engine was asked is what was recorded, under the name of who asked.
    assert Counter((names[who], ids) for who, ids in asked) == Counter((c.predictor, c.prompt_ids) for c in calls)
    (group,) = grouped(rollouts)
    scored = type(group)(group.example_id, tuple(with_score(r, index) for index, r in enumerate(group.rollouts)))
    rows = credit([scored], FSTConfig().with_values({"train.advantage_eps": 1e-300})).rows
    assert Counter(id(row.call) for row in rows) == Counter(id(call) for call in calls)
    sides = {id(call): (-1.0, 1.0)[place] for place, rollout in enumerate(scored.rollouts) for call in rollout.calls}
    assert all(row.advantage == sides[id(row.call)] for row in rows)
