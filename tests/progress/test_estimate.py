"""What is left of a run: right where phases of a kind take the same, and steady on the events of a real run."""

from itertools import accumulate, pairwise

import pytest

from fst_optimizer.progress.estimate import Left, Pace, time_left
from fst_optimizer.progress.plan import Plan, Position
from fst_optimizer.progress.snapshot import Snapshot, advance
from helpers.recorded import events

PLAN = Plan(
    "fst",
    cycles=4,
    steps_per_cycle=6,
    fast_rollouts=192,
    anchor=16,
    step_rollouts=64,
    eval_rollouts=96,
    test_rollouts=0,
)
SECONDS = {"first eval": 6.0, "fast": 40.0, "eval of prompts": 9.0, "slow": 5.0, "eval of weights": 12.0}
ROLLOUTS = {"first eval": 64, "fast": 150, "eval of prompts": 96, "slow": 64, "eval of weights": 96}


def by_rule(plan, seconds):
    """(snapshot, cycles done by the lines) after each event of a run whose phases of a kind all take the same."""
    numbers = list(range(1, plan.steps_per_cycle + 4))
    phases = [(0, 0), *((cycle, number) for cycle in range(plan.cycles) for number in numbers)]
    now, step = 0.0, 0
    snapshot = Snapshot(plan=plan)
    for cycle, number in phases:
        stage = plan.stage(number)
        if (stage == "fast" and plan.method == "rl") or (stage == "slow" and plan.method == "gepa"):
            continue
        phase = stage.split()[0] if number else "eval"
        events = [{"kind": "phase", "phase": phase, "cycle": cycle, "number": number, "step": step}]
        count = ROLLOUTS[stage]
        events += [{"kind": "progress", "phase": phase, "done": one + 1, "total": count} for one in range(count)]
        for place, event in enumerate(events):
            snapshot = advance(snapshot, {**event, "time_s": now + seconds[stage] * place / (count + 1)})
            yield snapshot
        now, step = now + seconds[stage], step + (stage == "slow")


def totals(snapshots):
    """(cycles done, seconds of the whole run as they are expected at that moment, whether that is sure)."""
    for snapshot in snapshots:
        left = snapshot.left(snapshot.time_s)
        if left is not None:
            yield snapshot.at.cycle, snapshot.time_s + left.seconds, left.sure


def recorded():
    return accumulate(events(), advance, initial=Snapshot())


def by_share(snapshots, cycles, steps):
    """The same by the share of cycles and steps done, at the pace since the first: how it was estimated before."""
    first = None
    for now in snapshots:
        share = min(now.at.cycle + (now.step - now.at.cycle * steps) / steps, cycles) / cycles
        if first is None and share:
            first = (now.time_s, share)
        elif first is not None and share > first[1]:
            yield now.at.cycle, now.time_s + (1 - share) * (now.time_s - first[0]) / (share - first[1]), True


def rise(values):
    """By how much of itself a value ever rises above the lowest before it."""
    values = list(values)
    return max(now / low - 1 for low, now in zip(accumulate(values, min), values, strict=True))


@pytest.mark.parametrize("method", ["fst", "rl", "gepa"])
def test_where_phases_of_a_kind_take_the_same_the_end_is_foreseen(method):
    plan = Plan(method, 4, 6, 192, 16, 64, 96, 0)
    *_, last = snapshots = list(by_rule(plan, SECONDS))
    stages = {"fst": 40 + 9 + 30 + 12, "rl": 9 + 30 + 12, "gepa": 40 + 9 + 12}
    whole = 6 + 4 * stages[method]
    found = [total for cycle, total, _ in totals(snapshots) if cycle]
    assert len(found) > 500
    assert max(abs(total / whole - 1) for total in found) < 0.02
    assert last.left(last.time_s).seconds < 1


def test_by_the_share_of_steps_it_more_than_doubled():
    snapshots = list(by_rule(PLAN, SECONDS))
    assert rise(total for cycle, total, _ in by_share(snapshots, 4, 6) if cycle) > 1.0
    assert rise(total for cycle, total, _ in totals(snapshots) if cycle) < 0.02


def test_on_a_real_run_the_estimate_is_steady():
    new, old = list(totals(recorded())), list(by_share(recorded(), 5, 4))
    assert rise(total for _, total, _ in new) < 0.25 < 0.5 < rise(total for _, total, _ in old)
    assert rise(total for cycle, total, _ in new if cycle) < 0.1 < rise(total for cycle, total, _ in old if cycle)
    jumps = [now - before for (_, before, _), (_, now, _) in pairwise(new)]
    assert max(jumps) < 110 / 5 / 2  # half a cycle
    assert [sure for cycle, _, sure in new if cycle] == [True] * sum(cycle > 0 for cycle, *_ in new)


def test_nothing_is_said_before_the_work_of_the_method_was_measured():
    at, measured = Position(number=3, stage="slow"), Pace({"fast": (1, 40.0, 150)}, began_s=55.0)
    assert time_left(PLAN, at, measured, 60.0) is None
    assert time_left(PLAN, at, measured.counted().ended("slow", 60.0), 60.0) is not None


def test_a_kind_that_was_not_measured_takes_as_long_as_other_rollouts():
    plan = Plan("rl", 1, 1, 0, 1, 64, 100, 0)
    pace = Pace({"slow": (1, 32.0, 64)}, began_s=40.0)
    assert time_left(plan, Position(number=4, stage="eval of weights"), pace, 40.0) == Left(50.0, True)
    two = Plan("rl", 2, 1, 0, 1, 64, 100, 0)
    # This validation and those two of the next cycle at half a second a rollout, and its step.
    assert time_left(two, Position(number=4, stage="eval of weights"), pace, 40.0) == Left(50 + 50 + 32 + 50, False)


def test_a_phase_that_is_slow_is_followed_by_its_own_pace():
    plan = Plan("rl", 1, 1, 0, 1, 100, 0, 0)
    pace = Pace({"slow": (1, 10.0, 100), "eval of weights": (1, 0.0, 0)}, began_s=0.0, rollouts=50)
    # Expected to take 10, half done after 20: nothing left by the plan, 20 by its pace; half of each.
    assert time_left(plan, Position(number=3, stage="slow"), pace, 20.0).seconds == 10.0


def test_the_time_that_a_run_may_take_bounds_it():
    plan = Plan("rl", 50, 1, 0, 1, 64, 0, 0, max_time_s=100.0)
    pace = Pace({"slow": (1, 32.0, 64), "eval of prompts": (1, 0.0, 0)}, began_s=40.0)
    assert time_left(plan, Position(cycle=1, number=1, stage="fast"), pace, 40.0).seconds == 60.0


def test_a_phase_that_began_in_an_earlier_process_says_nothing_of_its_kind():
    pace = Pace(began_s=100.0, partial=True).counted().ended("slow", 101.0)
    assert pace.phases == {}
    assert pace.counted().ended("slow", 111.0).phases == {"slow": (1, 10.0, 1)}


def test_a_phase_that_a_cap_left_out_says_nothing_either():
    assert Pace().ended("slow", 0.1).phases == {}
    assert Pace().ended("eval of prompts", 0.1).phases == {"eval of prompts": (1, 0.1, 0)}
