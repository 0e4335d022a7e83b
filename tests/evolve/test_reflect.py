import random
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import dspy
import pytest
from dspy.lm15 import Message, Response, TextPart, Usage
from dspy.utils import DummyLM
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.evolve.extractive import ExtractiveReflector, is_general, lessons, sentences
from fst_optimizer.evolve.reflect import LMReflector
from helpers import slow_reflect


def entry(feedback, score=0.0, got="a b", wanted="b a", **inputs):
    return {
        "Inputs": {"letters": "c d e", **inputs},
        "Generated Outputs": {"answer": got},
        "Feedback": feedback,
        "Score": score,
        "Metric Feedback": feedback,
        "Instance": (wanted,),
    }


def letters(got, wanted, rule="Drop the last letter."):
    return entry(f'Got "{got}", expected "{wanted}". {rule}', got=got, wanted=wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Drop it. Keep it!  Why?", ["Drop it.", "Keep it!", "Why?"]),
        ('Got "a. b", expected "b. A". Drop the last.', ['Got "a. b", expected "b. A".', "Drop the last."]),
        ('He said "Stop it." Then he left.', ['He said "Stop it."', "Then he left."]),
        ("one line\nanother line. Third", ["one line", "another line.", "Third"]),
        ("- First rule\n* Second rule\n3. Third rule", ["First rule", "Second rule", "Third rule"]),
        ("Use units, e.g. metres. Round to 3.5 at most.", ["Use units, e.g. metres.", "Round to 3.5 at most."]),
        ("Don't guess. It's the letters' order that counts.", ["Don't guess.", "It's the letters' order that counts."]),
        ("Write 'it's. fine' there. Done now.", ["Write 'it's. fine' there.", "Done now."]),
        ("", []),
        ("\n\n", []),
    ],
)
def test_sentences_stay_as_written(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    "sentence",
    [
        'Got "x".',
        "Expected 'y z' here.",
        "Use `sorted` here.",
        "It should be [1, 2].",
        "The letters are c d e today.",
        "You said a b there.",
        "It should be b a instead.",
        "There are 17 of them.",
        'An unclosed " quote here.',
        "Right.",
        "Well done!",
        "first: Right.",
    ],
)
def test_sentences_about_one_instance_and_praise_are_not_general(sentence):
    assert not is_general(sentence, entry("", count="17"))


@pytest.mark.parametrize("sentence", ["Drop the last letter.", "Answer in 3 words.", "Don't copy the letters' order."])
def test_sentences_that_tell_a_rule_are_general(sentence):
    assert is_general(sentence, entry("", count="17"))


HOSTILE_LETTERS = st.sampled_from(
    ["a", "B", "e.g", "Dr", " ", "  ", ".", "?", "!", "...", "\n", "- ", "3. ", "7", "2.5"]
)
QUOTES = st.sampled_from(list("\"'`\u201c\u201d\u2018\u2019«»[]{}()"))
TEXTS = st.lists(HOSTILE_LETTERS | QUOTES | st.characters(), max_size=40).map("".join)


@settings(max_examples=400)
@given(TEXTS)
def test_sentences_are_those_of_the_slow_reference(text):
    assert sentences(text) == slow_reflect.sentences(text)


@settings(max_examples=400)
@given(TEXTS, TEXTS, TEXTS, st.lists(TEXTS, max_size=3))
def test_general_sentences_are_those_of_the_slow_reference(sentence, got, wanted, inputs):
    one = entry(sentence, got=got, wanted=wanted, more=inputs)
    assert is_general(sentence, one) == slow_reflect.is_general(sentence, one)


@given(st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([0.0, 1.0])), max_size=4))
def test_lessons_are_those_of_the_slow_reference(said):
    dataset = [entry(feedback, score, got=got) for feedback, got, score in said]
    assert lessons(dataset) == slow_reflect.lessons(dataset)


class TooSlow(Exception):
    pass


@contextmanager
def seconds_of_processor(limit):
    """Raises inside where the block computes for longer."""

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize(
    "unit",
    [
        "'a ",
        "' ",
        '"',
        "[",
        "a' ",
        "'a'b ",
        '"a. ',
        ".",
        "!?",
        '."',
        "a. ",
        "a  . ",
        "1.",
        "- ",
        "word one. ",
        "\u2018x ",
    ],
)
def test_long_hostile_feedback_takes_time_in_proportion(unit):
    """20 KB of quotes took 42 s; this is ten times as much of it."""
    text = unit * (200_000 // len(unit))
    dataset = [entry(text, got=text, more=text.split()[:20_000]) for _ in range(2)]
    with seconds_of_processor(20):
        ExtractiveReflector()("answer", "Answer.", dataset)


def test_a_short_value_is_not_found_inside_other_words():
    assert is_general("Drop a letter.", entry("", got="a", wanted="rop"))


def test_the_lesson_of_the_letters_feedback_is_the_rule():
    dataset = [letters("a b", "b a"), letters("c d", "d c"), letters("e f", "f e")]
    reflect = ExtractiveReflector(seed=0)
    assert reflect("first", "Answer.", dataset) == "Answer. Drop the last letter."
    assert (reflect.calls, reflect.cost_usd, reflect.note) == (1, 0.0, "")


def test_the_sentence_of_more_failing_examples_comes_first():
    dataset = [
        entry("Sort them now. Be brief please."),
        entry("Sort them now. Be brief please."),
        entry("Sort them now."),
    ]
    assert lessons(dataset) == {"Sort them now.": 3, "Be brief please.": 2}
    assert ExtractiveReflector(0)("p", "Go.", dataset) == "Go. Sort them now."


def test_a_sentence_of_a_single_failing_example_among_many_is_no_lesson():
    assert lessons([entry("Sort them now."), entry("Reverse them now.")]) == {}


def test_one_failing_example_alone_may_teach():
    assert lessons([entry("Sort them now."), entry("Right.", score=1.0)]) == {"Sort them now.": 1}


def test_passing_examples_teach_nothing_and_veto_what_is_said_of_them():
    dataset = [entry("You always answer. Sort them now.")] * 2 + [entry("You always answer!", score=1.0)]
    assert lessons(dataset) == {"Sort them now.": 2}
    assert lessons([entry("Sort them now.", score=1.0)] * 3) == {}


def test_a_lesson_that_the_instruction_has_is_never_repeated():
    reflect = ExtractiveReflector(0)
    dataset = [letters("a b", "b a"), letters("c d", "d c")]
    assert reflect("p", "Please  drop the LAST letter!", dataset) is None
    assert reflect.note


def test_a_parsers_words_are_no_lesson():
    failed = {**entry("The response could not be parsed."), "Metric Feedback": ""}
    assert lessons([failed, failed]) == {}


def test_ties_are_broken_by_the_seed_and_the_arguments_alone():
    dataset = [entry("Sort them now. Reverse them now.")] * 2
    proposals = {seed: ExtractiveReflector(seed)("p", "Go.", dataset) for seed in range(12)}
    assert set(proposals.values()) == {"Go. Sort them now.", "Go. Reverse them now."}
    again = ExtractiveReflector(3)
    assert [again("p", "Go.", dataset) for _ in range(3)] == [proposals[3]] * 3


def test_no_feedback_no_proposal():
    assert ExtractiveReflector(0)("p", "Go.", []) is None
    assert ExtractiveReflector(0)("p", "Go.", [entry("")]) is None


class ScriptedLM:
    """Answers what it is told to, and keeps a history as dspy.LM does."""

    def __init__(self, *answers, cost=None, cached=False):
        self.answers, self.cost, self.cached = list(answers), cost, cached
        self.history, self.prompts = [], []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        self.history.append({"cost": self.cost, "response": SimpleNamespace(cache_hit=self.cached)})
        return [answer]


def test_the_lm_gets_gepas_prompt_and_its_block_is_the_new_text():
    lm = DummyLM([{"answer": "```\nDrop the last letter.\n```"}])
    reflect = LMReflector(lm)
    assert reflect("p", "Answer.", [letters("a b", "b a")]) == "Drop the last letter."
    prompt = lm.history[-1]["messages"] or lm.history[-1]["prompt"]
    assert "Answer." in str(prompt)
    assert "## Feedback" in str(prompt)
    assert "Instance" not in str(prompt)
    assert reflect.calls == 1


def test_costs_add_up_and_one_unknown_price_makes_the_sum_unknown():
    lm = ScriptedLM("```A```", "```B```", cost=0.25)
    reflect = LMReflector(lm)
    assert [reflect("p", "Go.", []), reflect("p", "Go.", [])] == ["A", "B"]
    assert (reflect.calls, reflect.cost_usd) == (2, 0.5)
    lm.answers, lm.cost = ["```C```"], None
    reflect("p", "Go.", [])
    assert reflect.cost_usd is None


def test_a_cached_answer_costs_nothing():
    reflect = LMReflector(ScriptedLM("```A```", cost=0.25, cached=True))
    reflect("p", "Go.", [])
    assert reflect.cost_usd == 0.0


class Custom(dspy.BaseLM):
    """An LM of one's own, which tells its tokens."""

    def forward(self, prompt=None, messages=None, **kwargs):
        message = SimpleNamespace(content="```A```", tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
        usage = {"prompt_tokens": 10**6, "completion_tokens": 10**6}
        return SimpleNamespace(choices=[choice], usage=usage, model="mine", _hidden_params={})


class Told:
    """An engine that answers, and tells a million tokens each way."""

    def complete(self, request):
        usage = Usage(input_tokens=10**6, output_tokens=10**6, total_tokens=2 * 10**6)
        message = Message.assistant([TextPart("```A```")])
        return Response(id=None, model="told", message=message, finish_reason="stop", usage=usage)

    def __deepcopy__(self, memo):
        return self


def spent(lm, prices=None, **context):
    """What one reflection costs, by the run's prices."""
    reflect = LMReflector(lm, prices)
    with dspy.context(**context):
        assert reflect("p", "Go.", []) == "A"
    return reflect.cost_usd


@pytest.mark.filterwarnings("ignore:Implementing custom LMs")
@pytest.mark.parametrize("context", [{}, {"disable_history": True}])
def test_the_runs_prices_hold_for_the_reflection_lm(context):
    prices = {"openai/told": (1.0, 2.0), "mine": (3.0, 4.0)}
    assert spent(dspy.LM("openai/told", engine=Told(), cache=False), prices, **context) == 3.0
    assert spent(Custom("mine"), prices, **context) == 7.0
    assert spent(dspy.LM("openai/no-such-model", engine=Told(), cache=False), prices, **context) is None
    assert spent(dspy.LM("hosted_vllm/own", engine=Told(), cache=False), **context) == 0.0


def test_an_answer_from_dspys_cache_costs_nothing_and_the_programs_own_tracker_hears_of_the_others():
    new = random.SystemRandom().random()  # a request that no test made before, whatever seeds the others set
    lm = dspy.LM("openai/told", engine=Told(), temperature=new)
    with dspy.track_usage() as tracker:
        assert [spent(lm, {"told": (1.0, 2.0)}) for _ in range(2)] == [3.0, 0.0]
    assert tracker.get_total_tokens()["openai/told"]["prompt_tokens"] == 10**6


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (RuntimeError("no route"), "the reflection LM failed: RuntimeError: no route"),
        ("", "the reflection LM answered nothing"),
        ("``` ```", "the reflection LM answered nothing"),
        ("```\nGo.\n```", "the reflection LM repeated the instruction"),
    ],
)
def test_an_lm_that_says_nothing_new_gives_none_and_a_note(answer, note):
    reflect = LMReflector(ScriptedLM(answer))
    assert reflect("p", "Go.", []) is None
    assert reflect.note == note
    assert reflect.calls == 1


def test_a_failing_lm_warns_once(caplog):
    reflect = LMReflector(ScriptedLM(RuntimeError("down"), RuntimeError("down")))
    with caplog.at_level("WARNING"):
        reflect("p", "Go.", [])
        reflect("p", "Go.", [])
    assert len(caplog.records) == 1


def test_thoughts_and_structured_outputs_are_read_past():
    thinking = "<think>maybe ```Bad``` no</think>```Good```"
    assert LMReflector(ScriptedLM(thinking))("p", "Go.", []) == "Good"
    assert LMReflector(ScriptedLM({"text": "```Good```", "reasoning_content": "hm"}))("p", "Go.", []) == "Good"
