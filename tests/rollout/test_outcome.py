"""Every way that a program ends, and the outcome and description that it gets."""

import json
from types import SimpleNamespace

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMRateLimitError

from fst_optimizer.rollout.outcome import describe_failure, outcome_of, raised_alike, raised_by, unparsed_call
from fst_optimizer.types import Call, Outcome, Raised, Rollout

SIGNATURE = dspy.Signature("question -> answer, mood")


def call(text, finish_reason="stop"):
    return Call("answer", (1,), (2,), (-1.0,), 1.0, 0, finish_reason, text)


def recorder(*calls, failure=None):
    return SimpleNamespace(calls=list(calls), failure=failure)


def unparsed(text):
    return AdapterParseError("ChatAdapter", SIGNATURE, text)


@pytest.mark.parametrize("failure", [None, Outcome.ENGINE_ERROR, Outcome.PROMPT_TOO_LONG])
def test_a_program_that_returns_is_ok_whatever_it_survived(failure):
    assert outcome_of(None, recorder(failure=failure)) is Outcome.OK


@pytest.mark.parametrize("failure", [None, Outcome.ENGINE_ERROR, Outcome.PROMPT_TOO_LONG])
def test_an_answer_that_does_not_parse_is_a_parse_error_whatever_came_before(failure):
    assert outcome_of(unparsed("no format"), recorder(call("no format"), failure=failure)) is Outcome.PARSE_ERROR


def test_an_answer_that_was_cut_and_does_not_parse_is_truncated():
    assert outcome_of(unparsed("no for"), recorder(call("no for", "length"))) is Outcome.TRUNCATED


def test_a_cut_call_beside_the_one_that_does_not_parse_does_not_count():
    cut, whole = call("abc", "length"), call("no format")
    assert outcome_of(unparsed("no format"), recorder(cut, whole)) is Outcome.PARSE_ERROR
    assert outcome_of(unparsed("no format"), recorder(whole, cut)) is Outcome.PARSE_ERROR


def test_an_answer_of_another_lm_that_does_not_parse_is_a_parse_error_not_truncated():
    assert outcome_of(unparsed("from a judge"), recorder(call("abc", "length"))) is Outcome.PARSE_ERROR
    assert outcome_of(unparsed(""), recorder()) is Outcome.PARSE_ERROR


@pytest.mark.parametrize("failure", [Outcome.ENGINE_ERROR, Outcome.PROMPT_TOO_LONG])
@pytest.mark.parametrize("error", [RuntimeError("gave up"), ContextWindowExceededError(message="long")])
def test_what_the_policys_engine_refused_is_how_it_ended(failure, error):
    assert outcome_of(error, recorder(failure=failure)) is failure


def test_an_lm_that_is_not_trained_and_fails_is_an_engine_error():
    assert outcome_of(LMRateLimitError("busy"), recorder()) is Outcome.ENGINE_ERROR


def test_a_prompt_too_long_for_an_lm_that_is_not_trained_is_the_programs_error():
    assert outcome_of(ContextWindowExceededError(message="long"), recorder()) is Outcome.PROGRAM_ERROR


def test_anything_else_that_the_program_raises_is_its_error():
    assert outcome_of(OSError("the database is away"), recorder(call("fine"))) is Outcome.PROGRAM_ERROR


def test_the_unparsed_call_is_the_last_with_that_text():
    calls = [call("same"), call("other"), call("<think>hm</think> same"), call("last")]
    assert unparsed_call(unparsed(" same "), calls) == 2
    assert unparsed_call(unparsed("unknown"), calls) is None


def test_an_empty_answer_is_taken_for_the_last_call():
    assert unparsed_call(unparsed("  "), [call("a"), call("")]) == 1
    assert unparsed_call(unparsed(""), []) is None


def test_a_failed_parse_is_described_by_the_fields_that_were_asked_for():
    said = describe_failure(Outcome.PARSE_ERROR, unparsed("no"))
    assert said == "The answer could not be parsed. It must give the fields `answer`, `mood` in the format asked for."
    assert "It was cut at max_tokens." in describe_failure(Outcome.TRUNCATED, unparsed("no"))


def test_an_error_is_described_by_its_type_and_words_without_secrets():
    assert describe_failure(Outcome.PROGRAM_ERROR, OSError("away")) == "OSError: away"
    said = describe_failure(Outcome.PROGRAM_ERROR, ValueError("Authorization: Bearer sk-abcdefghijklmnop1234"))
    assert "sk-abcdefghijklmnop1234" not in said


def test_text_that_is_no_unicode_is_escaped():
    describe_failure(Outcome.PROGRAM_ERROR, OSError("no file \udcff")).encode()


def test_without_an_error_the_outcome_is_the_description():
    assert describe_failure(Outcome.TIMEOUT, None) == "timeout"


# -- where a program raised -----------------------------------------------------------------------------------------


def raised(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return raised_by(error)
    raise AssertionError("nothing was raised")


def line_of(function, offset):
    return f"{__file__}:{function.__code__.co_firstlineno + offset} in {function.__name__}"


def mistyped(question):
    return question.strpi()


def through_a_library(text):
    return json.loads(text)


def endless(depth):
    if depth % 2:
        return endless(depth + 1)
    return endless(depth + 1)


def rollout(raised=None, outcome=Outcome.PROGRAM_ERROR):
    return Rollout("c", "train-0", 0, 0, outcome, 0.0, raised=raised)


def test_the_place_is_the_innermost_line_of_the_programs_own_code():
    found = raised(mistyped, "q")
    assert (found.error, found.place) == ("AttributeError", line_of(mistyped, 1))
    assert found.lines[-1] == "AttributeError: 'str' object has no attribute 'strpi'"
    assert any("return question.strpi()" in line for line in found.lines)
    library = raised(through_a_library, "{")
    assert (library.error, library.place) == ("JSONDecodeError", line_of(through_a_library, 1))
    assert any("json/decoder.py" in line for line in library.lines)  # where it came from is shown all the same


def test_what_a_library_raised_alone_has_its_innermost_line_as_place():
    found = raised(json.loads, "{")  # the frame of `raised` itself is of the test
    assert found.place.startswith(__file__)
    error = json.JSONDecodeError("odd", "{", 0)
    try:
        raise error
    except ValueError:
        error.__traceback__ = None
    assert raised_by(error).place == ""


def test_an_endless_recursion_has_the_place_where_it_was_entered():
    assert raised(endless, 0).place == raised(endless, 1).place
    assert len(raised(endless, 0).lines) < 16


def test_what_is_kept_of_a_traceback_is_short_plain_and_without_secrets():
    def leak():
        raise ValueError("\x1b[31m" + "Authorization: Bearer sk-abcdefghijklmnop1234\n" + "x" * 10_000 + "\n" * 1000)

    lines = raised(leak).lines
    text = "\n".join(lines)
    assert "sk-abcdefghijklmnop1234" not in text and "\x1b" not in text
    assert len(lines) < 16 and len(text) < 3000


def test_rollouts_failed_alike_when_error_and_place_are_the_same():
    one, other = Raised("KeyError", "a.py:3 in forward"), Raised("KeyError", "a.py:4 in forward")
    assert raised_alike([rollout(one), rollout(Raised("KeyError", "a.py:3 in forward", ("said otherwise",)))]) == one
    assert raised_alike([rollout(one)]) == one
    for others in (rollout(other), rollout(Raised("TypeError", one.place)), rollout(outcome=Outcome.OK)):
        assert raised_alike([rollout(one), others]) is None
        assert raised_alike([others, rollout(one)]) is None
    assert raised_alike([]) is None
    assert raised_alike([rollout(outcome=Outcome.PARSE_ERROR)] * 2) is None
