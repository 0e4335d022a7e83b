"""How a rollout ended: from what the program raised and what the recorder saw to an `Outcome` and its description."""

from __future__ import annotations

from collections.abc import Sequence

from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError

from fst_optimizer.engines.recorder import Recorder
from fst_optimizer.text import unicode_only, without_secrets
from fst_optimizer.types import Call, Outcome


def outcome_of(error: Exception | None, recorder: Recorder) -> Outcome:
    """The outcome of a rollout whose program raised `error`, or returned (None)."""
    if error is None:
        return Outcome.OK
    if isinstance(error, AdapterParseError):  # calls refused before it were handled by the program
        place = unparsed_call(error, recorder.calls)
        cut = place is not None and recorder.calls[place].finish_reason == "length"
        return Outcome.TRUNCATED if cut else Outcome.PARSE_ERROR
    if recorder.failure is None and isinstance(error, LMError) and not isinstance(error, ContextWindowExceededError):
        return Outcome.ENGINE_ERROR  # an LM that is not trained could not be reached: not the policy's doing
    return recorder.failure or Outcome.PROGRAM_ERROR


def unparsed_call(error: AdapterParseError, calls: Sequence[Call]) -> int | None:
    """The index of the call whose text did not parse; None when another LM wrote that text.

    It need not be the last call: programs may call in parallel.
    """
    calls = tuple(calls)
    text = str(error.lm_response).strip()
    if not text:
        return len(calls) - 1 if calls else None
    return next((place for place in reversed(range(len(calls))) if text in calls[place].text), None)


def describe_failure(outcome: Outcome, error: Exception | None) -> str:
    """What went wrong, for people and for the reflector."""
    if isinstance(error, AdapterParseError):
        fields = ", ".join(f"`{name}`" for name in error.signature.output_fields)
        cut = " It was cut at max_tokens." if outcome is Outcome.TRUNCATED else ""
        return f"The answer could not be parsed.{cut} It must give the fields {fields} in the format asked for."
    return unicode_only(without_secrets(f"{type(error).__name__}: {error}")) if error else str(outcome)
