"""The rollouts of a round: counted, never above the limit, and greedy ones never run twice."""

import pytest

from fst_optimizer.errors import FSTError
from fst_optimizer.evolve.budget import RolloutBudget
from fst_optimizer.types import Candidate, Item, Outcome, Rollout

A, B = Candidate({"p": "a"}), Candidate({"p": "b"})
ITEMS = tuple(Item(f"train-{index}", None) for index in range(4))


class Score:
    def __init__(self):
        self.asked = []

    def __call__(self, candidate, items, *, capture):
        self.asked.append(([item.id for item in items], capture))
        return [Rollout(candidate.id, item.id, 0, 0, Outcome.OK, float(item.id[-1])) for item in items]


def test_greedy_rollouts_are_run_once_captured_at_once_and_counted_as_reused_once():
    score = Score()
    budget = RolloutBudget(score, 10, reuse=True)
    assert budget.scores(A, ITEMS[:3]) == {"train-0": 0.0, "train-1": 1.0, "train-2": 2.0}
    again = budget.run(A, (ITEMS[1], ITEMS[3], ITEMS[1]), capture=True)
    assert [rollout.example_id for rollout in again] == ["train-1", "train-3", "train-1"]
    budget.run(A, ITEMS[1:2], capture=True)
    assert score.asked == [(["train-0", "train-1", "train-2"], True), (["train-3"], True)]
    assert (budget.spent, budget.left, budget.reused) == (4, 6, 1)


def test_another_candidate_shares_no_rollouts():
    budget = RolloutBudget(Score(), 10, reuse=True)
    budget.run(A, ITEMS, capture=False)
    budget.run(B, ITEMS, capture=False)
    assert (budget.spent, budget.reused) == (8, 0)


def test_sampled_rollouts_are_run_every_time_and_captured_only_when_asked():
    score = Score()
    budget = RolloutBudget(score, 10, reuse=False)
    for capture in (False, True):
        budget.run(A, ITEMS[:2], capture=capture)
    assert score.asked == [(["train-0", "train-1"], False), (["train-0", "train-1"], True)]
    assert (budget.spent, budget.reused) == (4, 0)


def test_what_is_not_left_is_not_spent():
    score = Score()
    with pytest.raises(AssertionError):
        RolloutBudget(score, 3, reuse=True).run(A, ITEMS, capture=False)
    assert score.asked == []


@pytest.mark.parametrize("wrong", [[], [ITEMS[1]], [ITEMS[0], ITEMS[0]]])
def test_rollouts_of_other_examples_are_refused(wrong):
    budget = RolloutBudget(lambda candidate, items, capture: Score()(candidate, wrong, capture=capture), 9, reuse=True)
    with pytest.raises(FSTError, match=r"asked for examples \['train-0'\]"):
        budget.run(A, ITEMS[:1], capture=False)
