"""How rollouts are counted by outcome."""

from fst_optimizer.store.tally import REMEDIES, FirstError, Tally, commonest_failure, tally_of
from fst_optimizer.types import Outcome, Rollout


def rollout(outcome, example="train-0", error=""):
    return Rollout("c", example, 0, 0, outcome, 0.0, error=error)


def test_rollouts_are_counted_and_the_first_that_failed_is_kept():
    late, odd = rollout(Outcome.TIMEOUT, "train-1", "late"), rollout(Outcome.PARSE_ERROR, "train-2", "odd")
    found = tally_of([rollout(Outcome.OK), late, odd, rollout(Outcome.OK)])
    assert found == Tally({"ok": 2, "parse_error": 1, "timeout": 1}, FirstError("timeout", "late", "train-1"))
    assert found.to_json() == {
        "outcomes": {"ok": 2, "parse_error": 1, "timeout": 1},
        "first_error": {"outcome": "timeout", "text": "late", "example": "train-1"},
    }
    assert tally_of([rollout(Outcome.OK)]).first_error is None
    assert tally_of([]) == Tally()


def test_two_tallies_add_up_and_the_earlier_error_stays():
    one, other = tally_of([rollout(Outcome.OK)]), tally_of([rollout(Outcome.TIMEOUT, "train-1", "late")])
    third = tally_of([rollout(Outcome.TIMEOUT, "train-2", "later"), rollout(Outcome.OK)])
    assert one.plus(other).plus(third) == Tally({"ok": 2, "timeout": 2}, FirstError("timeout", "late", "train-1"))


def test_an_error_is_kept_without_secrets_and_short():
    secret = "401 for Bearer sk-abcdefghijklmnop1234 " + "x" * 10_000
    text = tally_of([rollout(Outcome.PROGRAM_ERROR, error=secret)]).first_error.text
    assert "sk-abcdefghijklmnop1234" not in text and len(text) == 500
    assert str(FirstError("timeout", "two\nlines", "val-1")) == "timeout on val-1: two lines"


def test_nothing_parsed_where_all_are_unparsed_or_cut():
    assert tally_of([rollout(Outcome.PARSE_ERROR), rollout(Outcome.TRUNCATED)]).unread
    for other in (Outcome.OK, Outcome.PROGRAM_ERROR, Outcome.TIMEOUT):
        assert not tally_of([rollout(Outcome.PARSE_ERROR), rollout(other)]).unread
    assert not Tally().unread


def test_the_commonest_failure_is_never_ok():
    assert commonest_failure({"ok": 90, "timeout": 2, "parse_error": 3}) == (Outcome.PARSE_ERROR, 3)
    assert commonest_failure({"ok": 90}) is commonest_failure({}) is None


def test_there_is_something_to_do_for_every_outcome_but_ok():
    assert REMEDIES.keys() == set(Outcome) - {Outcome.OK}
