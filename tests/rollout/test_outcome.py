"""Every way that a program ends, and the outcome and description that it gets."""

from types import SimpleNamespace

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMRateLimitError

from fst_optimizer.rollout.outcome import describe_failure, outcome_of, unparsed_call
from fst_optimizer.types import Call, Outcome

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
