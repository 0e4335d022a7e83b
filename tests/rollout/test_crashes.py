"""What is one mistake in the program, and what is a rollout that went wrong."""

import pytest

from fst_optimizer.rollout.crashes import Crashes
from fst_optimizer.types import Outcome, Raised, Rollout

HERE, THERE = Raised("KeyError", "a.py:3 in forward"), Raised("KeyError", "a.py:4 in forward")


def crash(raised=HERE):
    return Rollout("c", "train-0", 0, 0, Outcome.PROGRAM_ERROR, 0.0, raised=raised)


def ended(outcome=Outcome.OK):
    return Rollout("c", "train-0", 0, 0, outcome, 0.0)


class Batch:
    """Rollouts that end one after another, and what was written down of them."""

    def __init__(self, crashes=None):
        self.crashes = crashes or Crashes()
        self.written = []

    def run(self, *rollouts, others=0, num_threads=4, known=()):
        for rollout in rollouts:
            self.crashes.ended(rollout, lambda rollout=rollout: self.written.append(rollout))
        return self.crashes.mistake(rollouts, others=others, num_threads=num_threads, known=known)


def test_a_first_batch_that_crashes_alike_is_a_mistake_and_not_written_down():
    batch = Batch()
    assert batch.run(crash(), crash()) == HERE
    assert batch.written == []


def test_crashes_are_written_down_as_soon_as_a_rollout_ends_otherwise():
    batch, crashes = Batch(), [crash(), crash()]
    for one in crashes:
        batch.crashes.ended(one, lambda one=one: batch.written.append(one))
    assert batch.written == []
    fine = ended()
    assert batch.run(fine) is None
    assert batch.written == [*crashes, fine]
    again = crash()
    assert batch.run(again, crash(THERE)) is None
    assert batch.written[3] is again


@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.PROGRAM_ERROR])
def test_any_other_outcome_says_that_it_is_no_mistake(outcome):
    batch = Batch()
    assert batch.run(crash(), ended(outcome), crash()) is None
    assert len(batch.written) == 3
    assert batch.run(crash(), crash()) is None, "only the first batch can say so"


def test_two_places_are_no_mistake():
    batch = Batch()
    assert batch.run(crash(HERE), crash(THERE)) is None
    assert len(batch.written) == 2


def test_a_few_crashes_beside_rollouts_of_before_are_left_to_the_next_batch():
    batch = Batch()
    assert batch.run(*[crash()] * 4, others=20) is None
    assert batch.written == []
    assert batch.run(crash(), crash()) == HERE
    assert batch.written == []
    batch = Batch()
    batch.run(crash(), others=20)
    assert batch.run(ended(), crash()) is None
    assert len(batch.written) == 3


def test_more_than_were_under_way_are_a_mistake_beside_rollouts_of_before():
    assert Batch().run(*[crash()] * 5, others=20, num_threads=4) == HERE


def test_what_the_run_has_had_before_is_no_mistake():
    batch = Batch()
    assert batch.run(*[crash()] * 8, known={str(HERE)}) is None
    assert len(batch.written) == 8
    assert Batch().run(crash(), known={str(THERE)}) == HERE


def test_an_empty_batch_says_nothing():
    batch = Batch()
    assert batch.run(others=4) is None
    assert batch.run(crash()) == HERE


def test_where_crashes_are_data_they_are_written_down_at_once():
    batch = Batch(Crashes(works=True))
    assert batch.run(crash()) is None
    assert len(batch.written) == 1
