"""What a method's cycle has, and what the budget leaves for it, worked by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fst_optimizer import schedule
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import Success, undecided_batch
from fst_optimizer.planned import RunSizes, planned
from fst_optimizer.run.batches import draw_anchor, next_batches, spare_examples
from fst_optimizer.run.monitors import Watch
from fst_optimizer.run.state import Best, State
from fst_optimizer.types import Candidate, Item, Population, RolloutCounts

SEED, BETTER = Candidate({"answer": "Say it."}), Candidate({"answer": "Say it backwards."})


def config(method="fst", **values):
    small = {"fast.anchor_size": 4, "fast.population": 2, "rollout.group_size": 4, "rollout.batch_size": 2}
    if method == "sequential":
        small["budget.max_rollouts"] = 100
    return FSTConfig().with_values({**small, "train.steps_per_cycle": 3, "method": method, **values})


def state(fast=0, slow=0, **fields):
    start = State(population=Population((SEED, BETTER), 3), best=Best(BETTER, 2, 0.5))
    return replace(start, rollouts=RolloutCounts(fast=fast, slow=slow, eval=1000), **fields)


@pytest.mark.parametrize(
    ("method", "fast", "slow"),
    [
        ("fst", True, True),
        ("rl", False, True),
        ("gepa", True, False),
        ("sequential", True, False),
        ("once", True, False),
    ],
)
def test_a_method_is_the_cycle_with_parts_left_out(method, fast, slow):
    assert schedule.has_fast_round(config(method), state()) == fast
    assert schedule.has_slow_steps(config(method), state()) == slow


def test_sequential_turns_to_the_weights_when_half_of_the_rollouts_are_spent():
    sequential = config("sequential")
    assert schedule.fast_rollouts_left(sequential, state(fast=46)) == 4
    assert schedule.has_fast_round(sequential, state(fast=46))
    # 3 rollouts are less than one candidate on the anchor of 4.
    assert not schedule.has_fast_round(sequential, state(fast=47))
    assert schedule.has_slow_steps(sequential, state(fast=47))
    assert schedule.rollouts_left(sequential, state(fast=47)) == 53


@pytest.mark.parametrize(
    ("values", "fast", "left"),
    [
        ({"fast.max_rollouts": 30}, 26, 4),  # by default what one fast round may spend
        ({"fast.max_rollouts": 30, "fast.once_rollouts": 70}, 66, 4),
        ({"fast.once_rollouts": 70, "budget.max_rollouts": 50}, 46, 4),  # the run's cap comes first
        ({"fast.once_rollouts": 4}, 0, 4),
    ],
)
def test_once_turns_to_the_weights_when_its_search_is_spent(values, fast, left):
    once = config("once", **values)
    assert schedule.fast_rollouts_left(once, state(fast=fast)) == left
    assert schedule.has_fast_round(once, state(fast=fast)) and not schedule.has_slow_steps(once, state(fast=fast))
    after = state(fast=fast + 1)
    assert not schedule.has_fast_round(once, after) and schedule.has_slow_steps(once, after)
    # What slow steps spend is none of the search's.
    assert schedule.fast_rollouts_left(config("once"), state(fast=100, slow=500)) == 192 - 100


def test_once_without_a_search_is_training_from_the_first_cycle_on():
    assert not schedule.has_fast_round(config("once", **{"fast.once_rollouts": 0}), state())
    assert schedule.has_slow_steps(config("once", **{"fast.once_rollouts": 0}), state())


@pytest.mark.parametrize("method", ["sequential", "once"])
def test_after_a_search_the_weights_are_trained_under_the_best_prompt_alone(method):
    assert schedule.trained_population(config(method), state(policy_version=5)) == Population((BETTER,), 5)
    assert schedule.trained_population(config("fst"), state()).candidates == (SEED, BETTER)


def test_evaluations_do_not_count_against_the_cap():
    assert schedule.rollouts_left(config(**{"budget.max_rollouts": 100}), state(fast=30, slow=30)) == 40
    assert schedule.rollouts_left(config(**{"budget.max_rollouts": 100}), state(fast=99, slow=99)) == 0
    assert schedule.rollouts_left(config(), state(fast=10**9)) > 10**9


def test_reflections_left():
    assert schedule.reflections_left(config(), state(reflection_calls=7)) is None
    assert schedule.reflections_left(config(**{"fast.reflection_calls": 10}), state(reflection_calls=7)) == 3


@pytest.mark.parametrize(
    ("values", "spent", "cap"),
    [
        ({}, {}, ""),
        ({"budget.max_steps": 5}, {"step": 4}, ""),
        ({"budget.max_steps": 5}, {"step": 5}, "max_steps"),
        ({"budget.max_rollouts": 20}, {"slow": 12}, ""),
        ({"budget.max_rollouts": 20}, {"slow": 13}, "max_rollouts"),
        ({"budget.max_rollouts": 20, "budget.max_steps": 5}, {"slow": 13, "step": 5}, "max_steps"),
    ],
)
def test_a_step_of_eight_rollouts_that_would_pass_a_cap_is_not_taken(values, spent, cap):
    assert schedule.cap_before_step(config(**values), state(**spent), 8) == cap


@pytest.mark.parametrize(
    ("ended", "cap", "looks"),
    [
        ("", "", True),
        ("budget", "max_rollouts", True),
        ("budget", "max_steps", True),
        ("budget", "max_time_s", False),
        ("budget", "max_tokens", False),
        ("stopped", "", False),
    ],
)
def test_which_ends_leave_room_for_a_last_evaluation(ended, cap, looks):
    assert schedule.leaves_evaluation(state(ended=ended, cap=cap)) == looks


@pytest.mark.parametrize(
    ("values", "fields", "ended", "cap"),
    [
        ({}, {}, "", ""),
        ({"budget.max_cycles": 3}, {"cycle": 2}, "done", ""),
        ({"budget.max_cycles": 3}, {"cycle": 1}, "", ""),
        ({"budget.patience": 2}, {"watch": Watch(stale=2)}, "stopped", ""),
        ({"budget.patience": 3}, {"watch": Watch(stale=2)}, "", ""),
        ({"budget.max_steps": 6}, {"step": 6}, "budget", "max_steps"),
        ({"method": "gepa", "budget.max_rollouts": 50}, {"fast": 47}, "budget", "max_rollouts"),
        ({"budget.max_cycles": 3}, {"cycle": 2, "ended": "stopped"}, "stopped", ""),
    ],
)
def test_whether_another_cycle_follows(values, fields, ended, cap):
    after = schedule.next_cycle(config(**values), state(batch=9, phase=6, **fields))
    assert (after.ended, after.cap) == (ended, cap)
    assert (after.cycle, after.batch, after.phase) == (fields.get("cycle", 0) + 1, 12, 0)


def found(outlook, why="patience", tried=()):
    return SimpleNamespace(
        outlook=outlook, notes=("x", f"ended: {why}"), tried=tried, population=Population((BETTER,), 3)
    )


@pytest.mark.parametrize("method", ["gepa", "sequential", "once"])
def test_a_search_is_over_after_two_rounds_in_a_row_with_nothing_new(method):
    after = schedule.after_fast_round(config(method), state(), found("barren"))
    assert (after.barren, after.search_over) == (1, "") and schedule.has_fast_round(config(method), after)
    unlucky = schedule.after_fast_round(config(method), after, found("open", tried=("x",)))
    assert (unlucky.barren, unlucky.search_over) == (0, "")
    assert set(unlucky.tried) == {SEED.id, BETTER.id, "x"}
    over = schedule.after_fast_round(config(method), after, found("barren", "nothing fails on the anchor"))
    why = "nothing new to try in 2 fast rounds in a row (the last ended: nothing fails on the anchor)"
    assert (over.search_over, over.tried) == (why, ())
    assert not schedule.has_fast_round(config(method), over)
    assert schedule.has_slow_steps(config(method), over) == (method != "gepa")


def test_a_search_in_which_nothing_can_be_proposed_any_more_is_over_at_once():
    after = schedule.after_fast_round(config("gepa"), state(), found("closed", "no reflections left"))
    assert after.search_over == "nothing can be proposed any more (no reflections left)"


@pytest.mark.parametrize("outlook", ["barren", "closed", "open"])
def test_fst_goes_on_with_its_rounds(outlook):
    assert schedule.after_fast_round(config("fst"), state(barren=7), found(outlook)) == state(barren=7)


def test_gepa_whose_search_is_over_is_done_and_sequential_goes_on():
    over = state(fast=10, search_over="nothing new")
    after = schedule.next_cycle(config("gepa", **{"budget.max_rollouts": 1000}), over)
    assert (after.ended, after.cap) == ("done", "")
    assert schedule.next_cycle(config("sequential"), over).ended == ""


def test_the_anchor_is_drawn_from_what_the_cycle_trains_on():
    items = [Item(f"train-{number}", None) for number in range(20)]
    batches = next_batches(items, config(), 6)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    anchor = draw_anchor(batches, config(), cycle=2)
    assert len(set(anchor)) == 4 and set(anchor) <= {item for batch in batches for item in batch}
    assert anchor == draw_anchor(batches, config(), cycle=2)
    others = {draw_anchor(batches, config(), cycle) for cycle in range(8)}
    assert len(others) > 1
    assert len(draw_anchor(batches, config(**{"fast.anchor_size": 16}), 0)) == 6  # all there are


def test_with_reuse_the_anchor_begins_with_the_first_batch():
    items = [Item(f"train-{number}", None) for number in range(20)]
    reuse = config(**{"rollout.reuse": "first_step", "fast.temperature": 1.0, "fast.anchor_size": 3})
    for cycle in range(8):
        batches = next_batches(items, reuse, 3 * cycle)
        anchor = draw_anchor(batches, reuse, cycle)
        assert set(anchor[:2]) == set(batches[0]) and anchor[2] in {*batches[1], *batches[2]}


def test_batches_are_drawn_by_what_was_known_before_the_cycle():
    items = [Item(f"train-{number}", None) for number in range(20)]
    undecided = config(**{"rollout.order": "undecided", "rollout.batch_size": 8})
    known = {item.id: Success(1.0, 1.0, 9) for item in items[:10]}
    batches = next_batches(items, undecided, 0, known)
    assert batches != next_batches(items, undecided, 0)
    assert batches == [undecided_batch(items, number, 8, undecided.seed, known) for number in range(3)]
    plain = config(**{"rollout.batch_size": 8})
    assert next_batches(items, plain, 0, known) == next_batches(items, plain, 0)
    at = state(success=known, success_now={"train-3": Success(0.5, 0.5)}, cycle=1)
    assert schedule.next_cycle(undecided, at).success == {"train-3": Success(0.5, 0.5)}


def test_what_may_take_the_place_of_flat_groups_is_all_else_in_another_order_each_step():
    items = [Item(f"train-{number}", None) for number in range(20)]
    spare = spare_examples(items, items[:5], config(), 4)
    assert sorted(spare, key=items.index) == items[5:] != spare
    assert spare == spare_examples(items, items[:5], config(), 4)
    assert spare != spare_examples(items, items[:5], config(), 5)
    known = {item.id: Success(1.0, 1.0, 9) for item in items[:15]}
    undecided = config(**{"rollout.order": "undecided"})
    firsts = [spare_examples(items, (), undecided, step, known)[0] for step in range(200)]
    assert sum(item in items[15:] for item in firsts) > 120  # 5 of weight 1 beside 15 of weight .1: 77%


@pytest.mark.parametrize(
    ("values", "steps", "slow"),
    [
        # 2 examples x 4 rollouts a step, a cap of 40, 3 steps a cycle.
        ({}, 5, 40),
        ({"rollout.stop_flat": True}, 10, 40),  # 4 rollouts a step, where all are flat
        ({"rollout.stop_flat": True, "budget.max_cycles": 1}, 3, 24),
        ({"rollout.refill": 3, "budget.max_cycles": 1}, 3, 40),  # 8 + 3 x 2 a step, 42: the cap comes first
        ({"rollout.refill": 3, "budget.max_cycles": 1, "budget.max_rollouts": 100}, 3, 42),
        ({"rollout.reuse": "first_step", "fast.temperature": 1.0, "budget.max_cycles": 4}, 9, 40),
    ],
)
def test_most_steps_and_rollouts_where_groups_may_be_given_up_or_refilled_or_known(values, steps, slow):
    found = planned(config(**{"budget.max_rollouts": 40, **values}), RunSizes(train=20, val=4))
    assert found.steps == steps
    assert min(found.slow, config(**{"budget.max_rollouts": 40, **values}).budget.max_rollouts) == slow


def test_the_ends_of_cycles_that_are_kept_lie_ever_farther_apart():
    kept, seen = {}, []
    for cycle in range(1, 9):
        now = state(cycle=cycle, policy_version=10 * cycle, kept=kept)
        kept = schedule.kept_versions(now, 3)
        seen.append(sorted(kept))
        assert kept == {cycle: 10 * cycle for cycle in kept}
    assert seen == [[1], [1, 2], [1, 2, 3], [2, 4], [2, 4, 5], [2, 4, 6], [2, 4, 6, 7], [4, 8]]
    assert schedule.kept_versions(state(cycle=9, kept=kept), 0) == {}


def test_the_next_cycle_keeps_what_the_settings_say():
    done = state(cycle=1, policy_version=6, kept={1: 3})
    assert schedule.next_cycle(config(**{"run.keep_versions": 2}), done).kept == {1: 3, 2: 6}
    assert schedule.next_cycle(config(), done).kept == {}
