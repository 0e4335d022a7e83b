"""A call rendered under other instructions has the very tokens that a real call under them has."""

import asyncio
import re

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rerender import UnderTeacher
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Candidate, Item, Rollout

LONG = "Read the question twice.\n\n  Then answer in the language of the question; never guess.\nEnd."


def lookup(word: str) -> str:
    """Looks a word up."""
    return f"meaning of {word}"


class Chain(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> middle", "Answer."))
        self.second = dspy.ChainOfThought(dspy.Signature("middle, question -> answer", "Answer well."))

    def forward(self, question):
        middle = self.first(question=question).middle
        return self.second(middle=middle, question=question)


class Agent(dspy.Module):
    def __init__(self):
        super().__init__()
        self.agent = dspy.ReAct(dspy.Signature("question -> answer", "Answer."), tools=[lookup], max_iters=3)

    def forward(self, question):
        return self.agent(question=question)


class Later(Chain):
    forward = None

    async def aforward(self, question):
        middle = (await self.first.acall(question=question)).middle
        return await self.second.acall(middle=middle, question=question)


del Later.forward


def one(kind, signature="question -> answer", **extra):
    class One(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = kind(dspy.Signature(signature, "Answer.") if isinstance(signature, str) else signature)

        def forward(self, question):
            return self.answer(question=question, **extra)

    return One()


def with_demos():
    program = one(dspy.Predict)
    program.answer.demos = [dspy.Example(question="1 + 1?", answer="2"), dspy.Example(question="half of one")]
    return program


def with_history():
    class Asks(dspy.Signature):
        """Answer."""

        history: dspy.History = dspy.InputField()
        question: str = dspy.InputField()
        answer: str = dspy.OutputField()

    history = dspy.History(messages=[{"question": "Who?", "answer": "Ann."}])
    return one(dspy.Predict, Asks, history=history)


def said(prompt, request):
    """An answer that every predictor above parses; an agent looks up once, then finishes."""
    turn = {"next_thought": "t", "next_tool_name": "lookup", "next_tool_args": '{"word": "sun"}'}
    if "observation_0" in prompt:
        turn |= {"next_tool_name": "finish", "next_tool_args": "{}"}
    fields = re.findall(r"\[\[ ## (\w+) ## \]\]", prompt)
    wanted = {name: turn.get(name, f"{name} it is") for name in dict.fromkeys(fields) if name != "completed"}
    return chat_answer(**wanted)


def calls_under(policy, program, texts, under_teacher=None):
    """The calls of one rollout under these instructions."""
    program.set_lm(policy.lm)
    collector = Collector(
        lambda candidate: apply_texts(program, candidate.texts),
        policy,
        Metric(lambda example, prediction: 1.0),
        FSTConfig().with_values({"rollout.num_threads": 1}),
    )
    item = Item("train-0", dspy.Example(question="Why?").with_inputs("question"))
    request = Request(Candidate(texts), item)
    (rollout,) = collector.run([request], version=0, temperature=1.0, under_teacher=under_teacher)
    return rollout


PROGRAMS = {
    "Predict": lambda: one(dspy.Predict),
    "ChainOfThought": lambda: one(dspy.ChainOfThought),
    "chain": Chain,
    "ReAct": Agent,
    "demos": with_demos,
    "history": with_history,
}


def exactly_rendered(policy, make):
    """The student's calls have as `teacher_ids` what the same calls under the teacher's instructions are asked."""
    own = seed_texts(make())
    teacher = {name: f"{text}\n{LONG} ({name})" for name, text in own.items()}
    under = UnderTeacher(own, teacher)
    student = calls_under(policy, make(), own, under)
    real = calls_under(policy, make(), teacher)
    assert student.outcome == real.outcome == "ok" and under.problems == {}
    assert [call.predictor for call in student.calls] == [call.predictor for call in real.calls]
    assert [call.teacher_ids for call in student.calls] == [call.prompt_ids for call in real.calls]
    assert all(call.teacher_ids != call.prompt_ids for call in student.calls)
    return student


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_call_under_the_teachers_instruction_has_the_tokens_of_a_real_one(scripted, name):
    student = exactly_rendered(scripted(said), PROGRAMS[name])
    assert len(student.calls) == {"chain": 2, "ReAct": 3}.get(name, 1)


@pytest.mark.parametrize("adapter", [dspy.JSONAdapter, dspy.XMLAdapter])
def test_so_it_has_in_other_prompt_formats(scripted, adapter):
    text = {dspy.JSONAdapter: '{"answer": "x"}', dspy.XMLAdapter: "<answer>x</answer>"}[adapter]
    with dspy.context(adapter=adapter()):
        exactly_rendered(scripted(lambda prompt, request: text), PROGRAMS["Predict"])


def test_so_it_has_in_a_program_that_runs_in_an_event_loop(scripted):
    assert asyncio.iscoroutinefunction(Later.aforward)
    assert len(exactly_rendered(scripted(said), Later).calls) == 2


def test_a_call_whose_answer_does_not_parse_is_rendered_too(scripted):
    policy, program = scripted(lambda prompt, request: "nothing"), one(dspy.Predict)
    under = UnderTeacher({"answer": "Answer."}, {"answer": LONG})
    rollout = calls_under(policy, program, {"answer": "Answer."}, under)
    assert rollout.outcome == "parse_error"
    (real,) = calls_under(policy, program, {"answer": LONG}).calls
    assert [call.teacher_ids for call in rollout.calls] == [real.prompt_ids]


def test_an_instruction_that_is_the_same_needs_no_rendering(scripted):
    policy, texts = scripted(said), {"first": "Answer.", "second.predict": "Answer well."}
    under = UnderTeacher(texts, {**texts, "first": LONG})
    first, second = calls_under(policy, Chain(), texts, under).calls
    assert first.teacher_ids != first.prompt_ids and second.teacher_ids == second.prompt_ids


class Rewrites(dspy.Module):
    """Its instruction is another one than the component's by the time it is asked."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

    def forward(self, question):
        changed = self.answer.signature.with_instructions("Answer. Today is Monday.")
        return self.answer(question=question, signature=changed)


class Rewritten(dspy.ChatAdapter):
    """Puts something into the messages that its own format does not make."""

    def __call__(self, lm, lm_kwargs, signature, demos, inputs):
        messages = self.format(signature, demos, inputs)
        messages[0]["content"] += "\nToday is Monday."
        return self._call_postprocess(signature, signature, lm(messages=messages), lm, lm_kwargs)


@pytest.mark.parametrize(
    ("program", "adapter", "problem"),
    [
        (Rewrites, dspy.ChatAdapter, "the program changes its instruction while it runs"),
        (lambda: one(dspy.Predict), Rewritten, "its messages are not what dspy's prompt format made of its inputs"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(scripted, program, adapter, problem):
    under = UnderTeacher({"answer": "Answer."}, {"answer": LONG})
    with dspy.context(adapter=adapter()):
        rollout = calls_under(scripted(said), program(), {"answer": "Answer."}, under)
    assert rollout.outcome == "ok"
    assert [call.teacher_ids for call in rollout.calls] == [()]
    assert under.problems == {"answer": problem}


def test_without_a_teacher_calls_are_as_ever_and_with_one_they_can_be_read_back(scripted):
    policy, texts = scripted(said), {"answer": "Answer."}
    plain = calls_under(policy, one(dspy.Predict), texts)
    taught = calls_under(policy, one(dspy.Predict), texts, UnderTeacher(texts, {"answer": LONG}))
    assert "teacher_ids" not in plain.to_json()["calls"][0]
    assert Rollout.from_json(plain.to_json()).calls == plain.calls
    assert Rollout.from_json(taught.to_json()).calls == taught.calls and taught.calls[0].teacher_ids
    assert [call.completion_ids for call in plain.calls] == [call.completion_ids for call in taught.calls]
