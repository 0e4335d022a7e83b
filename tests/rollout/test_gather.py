"""What a step asks for: halves, groups given up, what takes their place, and what is known already."""

from itertools import groupby

import pytest

from fst_optimizer import FSTConfig
from fst_optimizer.program.student import Teacher
from fst_optimizer.rollout.gather import first_half, gather, known_places, worth_keeping
from fst_optimizer.rollout.groups import group_requests
from fst_optimizer.types import Call, Candidate, Item, Outcome, Population, Rollout, TraceStep

A, B = (Candidate({"p": text}) for text in "ab")
ITEMS = tuple(Item(f"train-{number}", None) for number in range(9))
MANY = 10**6


def config(**values):
    return FSTConfig().with_values({"rollout.group_size": 4, "fast.population": 2, **values})


def groups_of(*items, settings=None, teachers=()):
    make = group_requests(Population((A, B)), settings or config(), teachers, step=3)
    return [make(item) for item in items]


class Runs:
    """Scores by example: a number for all of its rollouts, or one for each place in the group."""

    def __init__(self, **scores):
        self.scores = {f"train-{name[1:]}": score for name, score in scores.items()}
        self.asked = []
        self.lenient = []

    def __call__(self, requests, *, all_may_be_lost):
        self.asked.append([(one.item.id, one.index) for one in requests])
        self.lenient.append(all_may_be_lost)
        return [self.rollout(one) for one in requests]

    def rollout(self, one):
        score = self.scores[one.item.id]
        score = score[one.index] if isinstance(score, tuple) else score
        outcome = Outcome.ENGINE_ERROR if score is None else Outcome.OK
        return Rollout(one.candidate.id, one.item.id, one.index, 7, outcome, score or 0.0)


def short(asked):
    """`[("train-0", 0), ("train-0", 2)]` as `0:02`."""
    grouped = groupby(asked, key=lambda pair: pair[0])
    return " ".join(f"{name[6:]}:{''.join(str(index) for _, index in some)}" for name, some in grouped)


def test_by_default_all_is_asked_for_at_once():
    runs = Runs(e0=1.0, e1=(1.0, 0.0, 1.0, 0.0))
    found = gather(groups_of(*ITEMS[:2]), runs, config(), spare=groups_of(ITEMS[2]), left=MANY)
    assert [short(asked) for asked in runs.asked] == ["0:0123 1:0123"]
    assert runs.lenient == [False]
    assert found.rollouts == found.ran and len(found.ran) == 8
    assert (found.given_up, found.refilled, found.reused) == (0, 0, 0)


def test_a_first_half_has_all_prompts_as_evenly_as_they_divide():
    (group,) = groups_of(ITEMS[0])  # A A B B
    assert [one.index for one in first_half(group)] == [0, 2]
    taught = groups_of(ITEMS[0], teachers=[Teacher(A, None, 5)])[0]  # A A B B and a teacher with A's texts
    assert [one.index for one in first_half(taught)] == [0, 2, 4]
    three = group_requests(Population((A,)), config(**{"rollout.group_size": 3, "fast.population": 1}), step=0)
    assert [one.index for one in first_half(three(ITEMS[0]))] == [0, 1]


def test_a_group_whose_first_half_is_all_equal_is_given_up_and_the_others_are_as_ever():
    settings = config(**{"rollout.stop_flat": True})
    runs = Runs(e0=1.0, e1=(1.0, 0.0, 0.0, 0.0), e2=(0.0, 1.0, 0.0, 0.0))
    groups = groups_of(*ITEMS[:3], settings=settings)
    found = gather(groups, runs, settings, spare=groups_of(ITEMS[3]), left=MANY)
    # Example 2 would have been right under index 1: half a group is half of a chance.
    assert [short(asked) for asked in runs.asked] == ["0:02 1:02 2:02", "1:13"]
    assert runs.lenient == [False, True]
    assert (found.given_up, found.refilled, len(found.ran)) == (2, 0, 8)
    assert short([(one.example_id, one.index) for one in found.rollouts]) == "0:02 1:0123 2:02"


def test_examples_are_drawn_in_the_place_of_flat_ones_until_the_batch_is_full():
    settings = config(**{"rollout.refill": 5})
    mixed = (1.0, 1.0, 0.0, 1.0)
    runs = Runs(e0=1.0, e1=mixed, e2=0.0, e5=0.0, e6=mixed, e7=mixed)
    spare = groups_of(*ITEMS[5:9], settings=settings)
    found = gather(groups_of(*ITEMS[:3], settings=settings), runs, settings, spare=spare, left=MANY)
    assert [short(asked) for asked in runs.asked] == ["0:02 1:02 2:02", "5:02 6:02", "7:02", "1:13 6:13 7:13"]
    assert (found.given_up, found.refilled, len(found.ran)) == (3, 3, 18)
    assert short([(one.example_id, one.index) for one in found.rollouts]) == "0:02 1:0123 2:02 5:02 6:0123 7:0123"


def test_no_more_examples_are_drawn_than_the_bound_and_than_there_are():
    for settings, spare, drawn in (({"rollout.refill": 2}, 5, 2), ({"rollout.refill": 9}, 3, 3)):
        settings = config(**settings)
        runs = Runs(**{f"e{number}": 0.0 for number in range(9)})
        others = groups_of(*ITEMS[4 : 4 + spare], settings=settings)
        found = gather(groups_of(*ITEMS[:4], settings=settings), runs, settings, spare=others, left=MANY)
        assert (found.given_up, found.refilled, len(found.ran)) == (4 + drawn, drawn, 2 * (4 + drawn))


@pytest.mark.parametrize(("left", "drawn"), [(8, 0), (9, 0), (10, 1), (11, 1), (12, 2), (13, 2), (14, 3), (20, 3)])
def test_an_example_is_drawn_only_where_a_whole_group_of_it_can_be_paid(left, drawn):
    settings = config(**{"rollout.refill": 9})
    runs = Runs(e0=0.0, e1=(1.0, 1.0, 0.0, 1.0), e2=0.0, e3=0.0, e4=0.0)
    spare = groups_of(*ITEMS[2:5], settings=settings)
    found = gather(groups_of(*ITEMS[:2], settings=settings), runs, settings, spare=spare, left=left)
    # Two halves are 4 and the other half of example 1 is 2: with 4 more an example is drawn, which turns out flat and
    # leaves 2 of these.
    assert found.refilled == drawn and len(found.ran) == 6 + 2 * drawn <= left


def test_half_a_group_that_the_engine_failed_is_not_given_up():
    settings = config(**{"rollout.stop_flat": True})
    runs = Runs(e0=(1.0, 0.0, None, 1.0))
    found = gather(groups_of(ITEMS[0], settings=settings), runs, settings, left=MANY)
    assert (found.given_up, len(found.ran)) == (0, 4)


def test_with_credit_by_predictor_a_half_with_different_parts_goes_on():
    settings = config(**{"rollout.stop_flat": True, "train.credit": "predictor", "train.own_share": 1.0})
    call = {"prompt_ids": (1,), "completion_ids": (2,), "logprobs": (-1.0,), "temperature": 1.0}

    class Parts(Runs):
        def rollout(self, one):
            calls = tuple(Call(name, **call, policy_version=7, finish_reason="stop") for name in ("first", "second"))
            parts = {"first": float(one.index < 2), "second": float(one.index >= 2)}
            return Rollout(one.candidate.id, one.item.id, one.index, 7, Outcome.OK, 0.5, calls, predictor_scores=parts)

    assert gather(groups_of(ITEMS[0], settings=settings), Parts(), settings, left=MANY).given_up == 0
    whole = config(**{"rollout.stop_flat": True})
    assert gather(groups_of(ITEMS[0], settings=whole), Parts(), whole, left=MANY).given_up == 1


# -- rollouts of a fast round ----------------------------------------------------------------------------------------


def fast(candidate, number, score, *, version=7, outcome=Outcome.OK):
    trace = (TraceStep("p", {}, {}, "said"),)
    return Rollout(candidate.id, f"train-{number}", 0, version, outcome, score, trace=trace, feedback={"": "x"})


def test_kept_are_rollouts_of_the_candidates_that_stayed_on_examples_of_the_step():
    ran = [
        *(fast(A, 0, score) for score in (0.1, 0.2, 0.3)),
        fast(B, 0, 0.4, outcome=Outcome.ENGINE_ERROR),
        fast(B, 1, 0.5),
        fast(B, 8, 0.6),
        fast(Candidate({"p": "rejected"}), 0, 0.7),
    ]
    kept = worth_keeping(ran, Population((A, B)), ITEMS[:2], 2)
    assert [(one.candidate_id, one.example_id, one.score) for one in kept] == [
        (A.id, "train-0", 0.1),
        (A.id, "train-0", 0.2),
        (B.id, "train-1", 0.5),
    ]
    assert not any(one.trace or one.feedback for one in kept)


def test_they_take_the_first_places_of_their_candidate_and_only_what_is_missing_is_run():
    groups = groups_of(*ITEMS[:2])  # A A B B each
    known = known_places(groups, [fast(A, 0, 0.1), fast(B, 1, 0.5), fast(B, 1, 0.25), fast(B, 1, 0.75)], 7)
    assert {place: one.score for place, one in known.items()} == {
        ("train-0", 0): 0.1,
        ("train-1", 2): 0.5,
        ("train-1", 3): 0.25,
    }
    assert all(one.index == index for (_, index), one in known.items())
    runs = Runs(e0=1.0, e1=0.0)
    found = gather(groups, runs, config(), known=known, left=MANY)
    assert [short(asked) for asked in runs.asked] == ["0:123 1:01"]
    assert [one.score for one in found.rollouts] == [0.1, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.25]
    assert (found.reused, len(found.ran)) == (3, 5)


def test_rollouts_of_other_weights_and_places_of_teachers_are_not_taken():
    groups = groups_of(ITEMS[0], teachers=[Teacher(A, None, 5)])
    assert known_places(groups, [fast(A, 0, 0.1, version=6)], 7) == {}
    assert set(known_places(groups, [fast(A, 0, 0.1)] * 3, 7)) == {("train-0", 0), ("train-0", 1)}


def test_what_is_known_counts_in_the_first_half():
    settings = config(**{"rollout.stop_flat": True})
    groups = groups_of(ITEMS[0], settings=settings)
    runs = Runs(e0=0.0)
    # Index 0 and 1 are known: of the first half (0 and 2) one is run, and by index 1 the group is not flat.
    known = known_places(groups, [fast(A, 0, 0.0), fast(A, 0, 1.0)], 7)
    found = gather(groups, runs, settings, known=known, left=MANY)
    assert [short(asked) for asked in runs.asked] == ["0:2", "0:3"]
    assert (found.given_up, found.reused) == (0, 2)


def test_where_all_is_known_nothing_is_run():
    groups = groups_of(ITEMS[0])
    runs = Runs()
    known = known_places(groups, [fast(A, 0, 0.0), fast(A, 0, 1.0), fast(B, 0, 0.0), fast(B, 0, 1.0)], 7)
    found = gather(groups, runs, config(), known=known, left=0)
    assert (runs.asked, found.reused, found.ran) == ([], 4, ())
