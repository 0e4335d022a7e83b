from collections import Counter

from fst_optimizer import FSTConfig
from fst_optimizer.program.student import Teacher
from fst_optimizer.rollout.groups import fast_requests, group_requests, grouped
from fst_optimizer.types import Candidate, Item, Outcome, Population, Rollout

A, B, C = (Candidate({"p": text}) for text in "abc")
ITEMS = (Item("train-0", None), Item("train-1", None))


def test_a_group_is_shared_over_the_candidates_and_its_rollouts_are_numbered_through():
    config = FSTConfig().with_values({"rollout.group_size": 4, "fast.population": 4})
    group_of = group_requests(Population((A, B, C)), config, step=0)
    requests = [one for item in ITEMS for one in group_of(item)]
    assert [(one.item.id, one.candidate, one.index, one.version) for one in requests] == [
        (item, candidate, index, None)
        for item in ("train-0", "train-1")
        for index, candidate in enumerate((A, A, B, C))
    ]


def test_teachers_come_on_top_of_the_group_with_a_version_of_their_own():
    config = FSTConfig().with_values({"rollout.group_size": 2, "fast.population": 1, "rollout.teacher_rollouts": 2})
    teacher = Teacher(B, None, 7)
    requests = group_requests(Population((A,)), config, [teacher], step=0)(ITEMS[0])
    assert [(one.candidate, one.index, one.version) for one in requests] == [
        (A, 0, None),
        (A, 1, None),
        (B, 2, 7),
        (B, 3, 7),
    ]


def test_every_step_draws_anew_and_the_same_step_draws_the_same():
    config = FSTConfig().with_values({"rollout.group_size": 4})
    steps = [group_requests(Population((A,)), config, step=step)(ITEMS[0]) for step in (3, 4, 3)]
    assert steps[0] == steps[2]
    assert not {one.draw for one in steps[0]} & {one.draw for one in steps[1]}


def test_a_fast_round_that_samples_draws_anew_each_time_it_asks_and_in_each_cycle():
    asked = Counter()
    first = fast_requests(A, ITEMS, 1.0, 2, asked)
    again = fast_requests(A, ITEMS[1:], 1.0, 2, asked)
    other = fast_requests(B, ITEMS[1:], 1.0, 2, asked)
    later = fast_requests(A, ITEMS[1:], 1.0, 3, Counter())
    assert len({first[1].draw, again[0].draw, later[0].draw}) == 3
    assert first[0].draw == first[1].draw == other[0].draw
    after_a_kill = Counter()
    assert fast_requests(A, ITEMS, 1.0, 2, after_a_kill) == first
    assert fast_requests(A, ITEMS[1:], 1.0, 2, after_a_kill) == again


def test_greedy_fast_rounds_ask_for_the_same():
    asked = Counter()
    assert fast_requests(A, ITEMS, 0.0, 2, asked) == fast_requests(A, ITEMS, 0.0, 5, asked)


def rollout(candidate, example):
    return Rollout(candidate, example, 0, 0, Outcome.OK, 1.0)


def test_rollouts_of_one_example_are_one_group_across_candidates():
    rollouts = [rollout("a", "train-3"), rollout("a", "train-1"), rollout("b", "train-3")]
    first, second = grouped(rollouts)
    assert (first.example_id, first.rollouts) == ("train-3", (rollouts[0], rollouts[2]))
    assert (second.example_id, second.rollouts) == ("train-1", (rollouts[1],))


def test_shares_by_posterior_leave_out_a_prompt_that_is_clearly_worse_and_number_the_rest_through():
    config = FSTConfig().with_values({"fast.population": 2, "rollout.shares": "posterior"})
    names = [f"train-{place}" for place in range(8)]
    population = Population((A, B, C), 1, {A.id: dict.fromkeys(names, 1.0), B.id: dict.fromkeys(names, 0.0)})
    clear = Population((A, B), 1, population.scores)
    assert [(one.candidate, one.index) for one in group_requests(clear, config, step=0)(ITEMS[0])] == [
        (A, index) for index in range(8)
    ]
    evenly = group_requests(population, config, step=0)(ITEMS[0])  # C has no scores: nothing is known in common
    assert Counter(one.candidate.id for one in evenly) == {A.id: 3, B.id: 3, C.id: 2}
