"""The journal: every entry comes back once, and damage loses only the lines that it hit."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer.store.journal import Journal
from fst_optimizer.types import Call, Outcome, Rollout, TraceStep, Usage

FINITE = st.floats(allow_nan=False, allow_infinity=False)
CALLS = st.builds(
    Call,
    predictor=st.text(max_size=5),
    prompt_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    completion_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    logprobs=st.lists(FINITE, max_size=4).map(tuple),
    temperature=FINITE,
    policy_version=st.integers(0, 99),
    finish_reason=st.sampled_from(["stop", "length"]),
    text=st.text(max_size=9),
)
FIELDS = st.dictionaries(
    st.text(max_size=4), st.text(max_size=4) | st.lists(st.text(max_size=3), max_size=2), max_size=2
)
ROLLOUTS = st.builds(
    Rollout,
    candidate_id=st.just("abc"),
    example_id=st.text(max_size=6),
    index=st.integers(0, 7),
    policy_version=st.integers(0, 99),
    outcome=st.sampled_from(Outcome),
    score=FINITE,
    calls=st.lists(CALLS, max_size=2).map(tuple),
    trace=st.lists(
        st.builds(TraceStep, st.text(max_size=4), FIELDS, st.none() | FIELDS, st.text(max_size=5)), max_size=2
    ).map(tuple),
    feedback=st.dictionaries(st.text(max_size=4), st.text(max_size=9), max_size=2),
    predictor_scores=st.dictionaries(st.text(max_size=4), FINITE, max_size=2),
    error=st.text(max_size=5),
    seconds=FINITE,
    usage=st.dictionaries(st.text(max_size=4), st.builds(Usage, st.integers(0, 9), st.integers(0, 9)), max_size=2),
)


def rollout(score=0.5, **fields):
    return Rollout("abc", "train-1", 0, 3, Outcome.OK, score, **fields)


def key(index=0, version=3):
    return (version, "abc", "train-1", index, 1.0, False)


def filled(path, *scores):
    journal = Journal(path, clock=lambda: 7.5)
    for index, score in enumerate(scores):
        journal.add_rollout(key(index), rollout(score))
    journal.close()
    return path


@given(ROLLOUTS)
def test_a_rollout_comes_back_as_it_was(tmp_path_factory, one):
    path = tmp_path_factory.mktemp("journal") / "1.jsonl"
    journal = Journal(path)
    journal.add_rollout(key(), one)
    journal.close()
    assert Journal(path).rollout(key()) == one


def test_values_of_a_trace_that_are_no_json_come_back_as_the_text_that_a_reflector_reads(tmp_path):
    step = TraceStep("answer", {"n": 3, "set": {1}}, {"x": (1, object)}, "text")
    journal = Journal(tmp_path / "1.jsonl")
    journal.add_rollout(key(), rollout(trace=(step,)))
    journal.close()
    (again,) = Journal(tmp_path / "1.jsonl").rollout(key()).trace
    assert again == TraceStep("answer", {"n": "3", "set": "{1}"}, {"x": ["1", str(object)]}, "text")


def test_each_entry_is_served_once_and_to_its_own_key(tmp_path):
    journal = Journal(filled(tmp_path / "1.jsonl", 0.1, 0.2))
    assert journal.rollout(key(0, version=4)) is None
    assert [journal.rollout(key(1)), journal.rollout(key(1))] == [rollout(0.2), None]
    assert journal.rollout(key(0)) == rollout(0.1)
    assert journal.last_s == 7.5


def test_what_is_added_now_is_not_served_now(tmp_path):
    journal = Journal(tmp_path / "1.jsonl")
    journal.add_rollout(key(), rollout())
    assert journal.rollout(key()) is None


def test_reflections_come_back_by_their_prompt(tmp_path):
    journal = Journal(tmp_path / "1.jsonl")
    journal.add_reflection([{"text": "improve"}], "Better.", 0.25, 1)
    journal.add_reflection("other", "Other.", None, 2)
    journal.close()
    again = Journal(tmp_path / "1.jsonl")
    assert again.reflection([{"text": "else"}], 1) is None
    found = again.reflection([{"text": "improve"}], 1)
    assert (found["text"], found["cost_usd"]) == ("Better.", 0.25)
    assert again.reflection("other", 2)["cost_usd"] is None


def test_a_line_that_was_not_finished_is_cut_off_and_the_journal_goes_on(tmp_path):
    path = filled(tmp_path / "1.jsonl", 0.1, 0.2)
    path.write_bytes(path.read_bytes()[:-10])
    journal = Journal(path)
    assert [journal.rollout(key(0)), journal.rollout(key(1))] == [rollout(0.1), None]
    journal.add_rollout(key(1), rollout(0.9))
    journal.close()
    assert Journal(path).rollout(key(1)) == rollout(0.9)


@pytest.mark.parametrize("place", [0, 20, 60])
def test_a_damaged_line_costs_that_line_and_is_told(tmp_path, caplog, place):
    path = filled(tmp_path / "1.jsonl", 0.1, 0.2)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    journal = Journal(path)
    assert [journal.rollout(key(0)), journal.rollout(key(1))] == [None, rollout(0.2)]
    assert "1 lines are damaged, or of another run; what they held is run again" in caplog.text


def test_the_answers_of_another_run_are_not_taken_for_the_own_ones(tmp_path, caplog):
    path = tmp_path / "1.jsonl"
    journal = Journal(path, run_id="one")
    journal.add_rollout(key(), rollout(0.1))
    journal.close()
    assert Journal(path, run_id="other").rollout(key()) is None
    assert "1 lines are damaged, or of another run" in caplog.text
    assert Journal(path, run_id="one").rollout(key()) == rollout(0.1)


def test_threads_do_not_mix_their_lines(tmp_path):
    journal = Journal(tmp_path / "1.jsonl")

    def add(worker):
        for index in range(50):
            journal.add_rollout(key(100 * worker + index), rollout(index / 50))

    threads = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    again = Journal(tmp_path / "1.jsonl")
    assert all(again.rollout(key(100 * worker + index)) for worker in range(4) for index in range(50))


def test_without_a_path_nothing_is_kept(tmp_path):
    journal = Journal()
    journal.add_rollout(key(), rollout())
    journal.close()
    assert journal.rollout(key()) is None
    assert list(tmp_path.iterdir()) == []
