from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings, strategies
from optuna.trial import FrozenTrial, TrialState

from fst_optimizer.tuning.admission import Limits, admission, finished, repeated_failure

START = datetime(2026, 1, 1)


def trial(number, state, rollouts=0, cause=None, ended_s=None):
    attrs = {"rollouts": rollouts, **({"cause": cause} if cause else {})}
    ended = None if ended_s is None else START + timedelta(seconds=ended_s)
    return FrozenTrial(number, TrialState[state.upper()], None, START, ended, {}, {}, attrs, {}, {}, number)


def trials(*states):
    return [trial(number, state) for number, state in enumerate(states)]


def spent(trials):
    return sum(one.user_attrs["rollouts"] for one in trials)


def test_complete_and_pruned_trials_are_finished():
    assert finished(trials("complete", "pruned", "fail", "running", "waiting")) == 2


@pytest.mark.parametrize(
    ("states", "may"),
    [
        ((), "start"),
        (("complete", "pruned"), "done"),
        (("complete", "running"), "wait"),
        (("complete", "fail"), "start"),
        (("running", "fail"), "start"),
        (("waiting", "complete"), "start"),
    ],
)
def test_what_a_worker_may_do_where_two_trials_are_wanted(states, may):
    assert admission(trials(*states), Limits(2, cap=10)) == may


def test_a_trial_that_was_given_out_counts_those_before_it():
    seen = trials("complete", "running", "running")
    assert admission(seen, Limits(2, cap=10), before=1) == "start"
    assert admission(seen, Limits(2, cap=10), before=2) == "wait"
    assert admission(trials("complete", "fail", "running"), Limits(2, cap=10), before=2) == "start"


def test_a_budget_has_room_for_whole_trials_only():
    done = [trial(0, "complete", 100), trial(1, "pruned", 20), trial(2, "fail", 30)]
    assert spent(done) == 150
    assert admission(done, Limits(9, cap=100, budget=250)) == "start"
    assert admission(done, Limits(9, cap=100, budget=249)) == "budget"
    # One that runs may still take its whole cap, or be pruned and leave room.
    assert admission([*done, trial(3, "running", 5)], Limits(9, cap=100, budget=350)) == "start"
    assert admission([*done, trial(3, "running", 5)], Limits(9, cap=100, budget=349)) == "wait"


class Storage:
    """A study's trials under workers that ask, look and end in any order."""

    def __init__(self, limits):
        self.limits, self.states, self.rollouts = limits, [], []

    def trials(self):
        return [trial(n, state, spent) for n, (state, spent) in enumerate(zip(self.states, self.rollouts, strict=True))]


@settings(max_examples=300, deadline=None)
@given(
    strategies.integers(1, 5),
    strategies.integers(1, 4),
    strategies.one_of(strategies.none(), strategies.integers(10, 60)),
    strategies.data(),
)
def test_no_order_of_events_gives_more_trials_or_rollouts_than_asked_for(wanted, workers, budget, data):
    """Each worker looks whether to ask, asks, looks again and only then runs; anything may happen in between."""
    storage = Storage(Limits(wanted, cap=10, budget=budget))
    at = dict.fromkeys(range(workers), "free")
    for _ in range(60):
        worker = data.draw(strategies.sampled_from(sorted(at)))
        if at[worker] == "free":
            if admission(storage.trials(), storage.limits) == "start":
                at[worker] = "asking"
        elif at[worker] == "asking":
            at[worker] = (len(storage.states), "waiting for room")
            storage.states.append("running")
            storage.rollouts.append(0)
        else:
            number, doing = at[worker]
            if doing == "waiting for room":
                may = admission(storage.trials(), storage.limits, before=number)
                if may == "start":
                    at[worker] = (number, "running")
                elif may != "wait":
                    storage.states[number], at[worker] = "fail", "free"
            else:
                storage.states[number] = data.draw(strategies.sampled_from(["complete", "pruned", "fail"]))
                storage.rollouts[number] = data.draw(strategies.integers(0, 10))
                at[worker] = "free"
        assert finished(storage.trials()) <= wanted
        assert budget is None or spent(storage.trials()) <= budget


def failed(number, cause, ended_s=None):
    return trial(number, "fail", cause=cause, ended_s=number + 1.0 if ended_s is None else ended_s)


def good(number):
    return trial(number, "complete", ended_s=number + 1.0)


def test_three_failures_of_one_cause_in_a_row_stop_a_study():
    same = [failed(n, "out of memory") for n in range(3)]
    assert repeated_failure(same) == "out of memory"
    assert repeated_failure(same[:2]) is None
    assert repeated_failure([*same[:2], failed(2, "diverged")]) is None
    assert repeated_failure([*same[:2], good(2), failed(3, "out of memory")]) is None


def test_the_order_is_that_of_their_ends():
    assert repeated_failure([failed(0, "a", 9.0), good(1), failed(2, "a", 5.0), failed(3, "a", 6.0)]) == "a"


def test_what_was_interrupted_or_in_excess_is_no_failure():
    seen = [failed(0, "a"), failed(1, "interrupted"), failed(2, "a"), failed(3, "surplus"), failed(4, "a")]
    assert repeated_failure(seen) == "a"
    assert repeated_failure([failed(n, "interrupted") for n in range(3)]) is None


def test_failures_from_before_do_not_count_again():
    seen = [failed(n, "a") for n in range(4)]
    assert repeated_failure(seen, known={0, 1}) is None
    assert repeated_failure(seen, known={0}) == "a"
