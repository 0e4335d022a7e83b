import pytest

from fst_optimizer.lab.drift import OWN, PROBE, Place, along, places, table


def line(kind, cycle, step, version, fast=0, slow=0, score=0.0, kl=0.0, split="val"):
    counts = {"fast": fast, "slow": slow, "eval": 9, "reused": 0}
    own = {"split": split, "score": score, "kl_to_base": kl} if kind == "eval" else {}
    return {"kind": kind, "cycle": cycle, "step": step, "policy_version": version, "rollouts": counts, **own}


LINES = [
    line("eval", 0, 0, 0, score=0.1),
    line("fast", 0, 0, 0, fast=30),
    line("eval", 0, 0, 0, fast=30, score=0.3),  # under the new prompt, before any step
    line("step", 0, 1, 1, fast=30, slow=8),
    line("eval", 0, 1, 1, fast=30, slow=8, score=0.4, kl=0.01),
    line("eval", 0, 1, 1, fast=30, slow=8, score=0.5, kl=0.02),  # another candidate
    line("fast", 1, 1, 1, fast=40, slow=8),
    line("step", 1, 2, 2, fast=40, slow=16),
    line("eval", 1, 2, 2, fast=40, slow=16, score=0.6, kl=0.1),
    line("step", 2, 3, 3, fast=40, slow=24),
    line("eval", 2, 3, 3, fast=40, slow=24, score=0.7, kl=0.2),
]


def test_a_run_is_measured_at_its_start_and_at_ends_of_cycles_whose_weights_are_there():
    assert places(LINES, {1, 3}) == [
        Place(0, 0, 0, 0, 0.1, 0.0),
        Place(1, 1, 38, 1, 0.5, 0.02),
        Place(3, 3, 64, 3, 0.7, 0.2),
    ]
    assert [place.policy_version for place in places(LINES, ())] == [0]


def test_a_method_that_never_trains_is_at_the_base_all_along():
    lines = [line("eval", 0, 0, 0, score=0.1)]
    for cycle in (0, 1):
        spent = 30 * (cycle + 1)
        lines += [line("fast", cycle, 0, 0, fast=spent), line("eval", cycle, 0, 0, fast=spent, score=(0.2, 0.3)[cycle])]
    found = places(lines, ())
    assert [(place.cycle, place.rollouts, place.score) for place in found] == [(0, 0, 0.1), (1, 30, 0.2), (2, 60, 0.3)]


def row(role, on, rollouts, score, kl, seed=0):
    told = {"task": "t:sort", "method": "rl", "rule": "sort", "seed": seed, "run": f"sort/rl-seed{seed}"}
    return {**told, "role": role, "on": on, "rollouts": rollouts, "score": score, "kl": kl}


ROWS = [
    row(OWN, "t:sort", 0, 0.2, 0.0),
    row(PROBE, "a", 0, 1.0, 0.0),
    row(PROBE, "b", 0, 0.8, 0.0),
    row(OWN, "t:sort", 64, 0.9, 0.5),
    row(PROBE, "a", 64, 0.2, 0.4),
    row(PROBE, "b", 64, 0.4, 0.8),
    row(PROBE, "a", 0, 1.0, 0.0, seed=1),
]


def test_probes_are_averaged_at_each_place_of_each_run():
    found = along(ROWS, PROBE)
    assert [run[-1] for run in found] == ["sort/rl-seed0", "sort/rl-seed1"]
    first, last = found["t:sort", "rl", 0, "sort/rl-seed0"]
    assert first == {"rollouts": 0, "score": pytest.approx(0.9), "kl": 0.0}
    assert last == {"rollouts": 64, "score": pytest.approx(0.3), "kl": pytest.approx(0.6)}


def test_the_table_has_the_ends_of_each_run_by_what_it_was_measured_on():
    _, lines = table(ROWS)
    assert lines[0] == ["sort", "rl", "0", "its own validation", "0.200", "0.900", "0.5000"]
    assert lines[1] == ["sort", "rl", "0", "probes", "0.900", "0.300", "0.6000"]
