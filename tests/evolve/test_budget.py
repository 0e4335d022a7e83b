"""The rollouts of a round: counted, never above the limit, and greedy ones never run twice."""

from dataclasses import replace

import pytest

from fst_optimizer.errors import FSTError
from fst_optimizer.evolve.budget import RolloutBudget
from fst_optimizer.types import Candidate, Item, Outcome, Rollout

A, B = Candidate({"p": "a"}), Candidate({"p": "b"})
ITEMS = tuple(Item(f"train-{index}", None) for index in range(4))


class Score:
    def __init__(self, **lost):
        """`train_1=2`: the engine fails that example two times."""
        self.asked = []
        self.lost = {name.replace("_", "-"): times for name, times in lost.items()}

    def __call__(self, wanted, *, capture):
        self.asked.append(([item.id for _, items in wanted for item in items], capture))
        return [self.rollout(candidate, item.id) for candidate, items in wanted for item in items]

    def rollout(self, candidate, name):
        self.lost[name] = self.lost.get(name, 0) - 1
        if self.lost[name] >= 0:
            return Rollout(candidate.id, name, 0, 0, Outcome.ENGINE_ERROR, 0.0)
        return Rollout(candidate.id, name, 0, 0, Outcome.OK, float(name[-1]))


def run(budget, candidate, items, **how):
    (rollouts,) = budget.run([(candidate, items)], **how)
    return rollouts


def test_greedy_rollouts_are_run_once_captured_at_once_and_counted_as_reused_once():
    score = Score()
    budget = RolloutBudget(score, 10, reuse=True)
    assert budget.scores(A, ITEMS[:3]) == {"train-0": 0.0, "train-1": 1.0, "train-2": 2.0}
    again = run(budget, A, (ITEMS[1], ITEMS[3], ITEMS[1]), capture=True)
    assert [rollout.example_id for rollout in again] == ["train-1", "train-3", "train-1"]
    run(budget, A, ITEMS[1:2], capture=True)
    assert score.asked == [(["train-0", "train-1", "train-2"], True), (["train-3"], True)]
    assert (budget.spent, budget.left, budget.reused) == (4, 6, 1)


def test_the_predictors_own_scores_of_greedy_rollouts_are_kept():
    class Parts(Score):
        def rollout(self, candidate, name):
            found = super().rollout(candidate, name)
            return replace(found, predictor_scores={"p": found.score / 2})

    for reuse, parts in ((True, {"train-2 p": 1.0}), (False, {})):
        budget = RolloutBudget(Parts(train_3=9), 10, reuse=reuse)
        budget.scores(A, ITEMS)
        assert budget.part_scores(A.id, ["train-2", "train-3"]) == parts
        assert budget.part_scores(B.id, ["train-2"]) == {}


def test_several_candidates_are_one_batch_and_each_gets_its_own():
    score = Score()
    budget = RolloutBudget(score, 10, reuse=True)
    budget.scores(A, ITEMS[:1])
    a, b = budget.run([(A, ITEMS[:2]), (B, ITEMS[1:])], capture=False)
    assert [(one.candidate_id, one.example_id) for one in (*a, *b)] == [
        *((A.id, "train-0"), (A.id, "train-1")),
        *((B.id, "train-1"), (B.id, "train-2"), (B.id, "train-3")),
    ]
    assert score.asked[1:] == [(["train-1", "train-1", "train-2", "train-3"], True)]
    assert (budget.spent, budget.reused) == (5, 1)


def test_another_candidate_shares_no_rollouts():
    budget = RolloutBudget(Score(), 10, reuse=True)
    run(budget, A, ITEMS, capture=False)
    run(budget, B, ITEMS, capture=False)
    assert (budget.spent, budget.reused) == (8, 0)


def test_sampled_rollouts_are_run_every_time_and_captured_only_when_asked():
    score = Score()
    budget = RolloutBudget(score, 10, reuse=False)
    for capture in (False, True):
        run(budget, A, ITEMS[:2], capture=capture)
    assert score.asked == [(["train-0", "train-1"], False), (["train-0", "train-1"], True)]
    assert (budget.spent, budget.reused) == (4, 0)


@pytest.mark.parametrize("reuse", [True, False])
def test_what_the_engine_failed_is_run_once_more_and_counted(reuse):
    score = Score(train_1=1, train_2=2)
    budget = RolloutBudget(score, 10, reuse=reuse)
    assert budget.scores(A, ITEMS) == {"train-0": 0.0, "train-1": 1.0, "train-3": 3.0}
    assert score.asked[1:] == [(["train-1", "train-2"], reuse)]
    assert budget.spent == 6


def test_what_is_lost_for_good_is_not_asked_for_again_by_a_greedy_round():
    budget = RolloutBudget(Score(train_1=2), 10, reuse=True)
    budget.scores(A, ITEMS)
    assert [rollout.lost for rollout in run(budget, A, ITEMS, capture=True)] == [False, True, False, False]
    assert budget.spent == 5


@pytest.mark.parametrize(("limit", "reserve", "again"), [(4, 0, 0), (5, 0, 1), (9, 3, 2), (6, 1, 1), (5, 1, 0)])
def test_what_is_reserved_is_not_spent_on_lost_rollouts(limit, reserve, again):
    budget = RolloutBudget(Score(train_1=1, train_2=1), limit, reuse=True)
    budget.scores(A, ITEMS, reserve=reserve)
    assert budget.spent == 4 + again


def test_what_is_not_left_is_not_spent():
    score = Score()
    with pytest.raises(AssertionError):
        run(RolloutBudget(score, 3, reuse=True), A, ITEMS, capture=False)
    assert score.asked == []


@pytest.mark.parametrize("wrong", [[], [ITEMS[1]], [ITEMS[0], ITEMS[0]]])
def test_rollouts_of_other_examples_are_refused(wrong):
    budget = RolloutBudget(lambda wanted, capture: Score()([(A, wrong)], capture=capture), 9, reuse=True)
    with pytest.raises(FSTError, match=r"asked for examples \['train-0'\]"):
        run(budget, A, ITEMS[:1], capture=False)
