from contextlib import closing

import pytest

from fst_optimizer.config.run import METHODS
from fst_optimizer.lab.curves import (
    Point,
    against,
    at_cycle_ends,
    curve_of,
    first_reaching,
    ratio,
    score_band,
    search_of,
    settled_best,
    signal_left,
)
from fst_optimizer.progress.display import Display
from fst_optimizer.store.metrics import read_metrics
from helpers.toy import answer, run_toy

RL = [Point(0, 0.2, 0.0), Point(100, 0.5, 0.1), Point(200, 0.58, 0.4), Point(300, 0.6, 0.8)]
FST = [Point(0, 0.2, 0.0), Point(50, 0.57, 0.05), Point(100, 0.6, 0.1)]


def eval_line(fast, slow, score, split="val"):
    rollouts = {"fast": fast, "slow": slow, "eval": 7, "reused": 9}
    return {"kind": "eval", "split": split, "score": score, "kl_to_base": score / 10, "rollouts": rollouts}


def test_a_curve_counts_fast_and_slow_rollouts_and_nothing_else():
    lines = [eval_line(0, 0, 0.1), {"kind": "step"}, eval_line(30, 12, 0.4), eval_line(30, 12, 0.9, split="test")]
    assert curve_of(lines) == [Point(0, 0.1, 0.01), Point(42, 0.4, 0.04)]


def test_candidates_validated_at_the_same_cost_are_one_point_the_best():
    assert curve_of([eval_line(5, 5, 0.3), eval_line(5, 5, 0.5), eval_line(5, 5, 0.4)]) == [Point(10, 0.5, 0.05)]


def test_the_settled_best_is_the_first_within_one_standard_error_of_the_maximum():
    # sqrt(0.6 * 0.4 / 100) = 0.049: the floor is 0.551, which 0.5 is below and 0.58 above.
    assert settled_best(RL, 100) == RL[2]
    # sqrt(0.24 / 10000) = 0.0049: now only the maximum itself will do.
    assert settled_best(RL, 10_000) == RL[3]


def test_a_score_that_is_never_reached_has_no_point():
    assert first_reaching(FST, 0.58) == FST[2]
    assert first_reaching(FST, 0.61) is None


def test_a_ratio_to_nothing_is_none():
    assert ratio(3.0, 4.0) == 0.75
    assert ratio(3.0, 0.0) is None


def test_a_band_holds_each_seeds_last_score_and_ends_with_the_shortest_curve():
    one = [Point(0, 0.2, 0), Point(100, 0.4, 0), Point(200, 0.6, 0)]
    two = [Point(0, 0.4, 0), Point(150, 0.8, 0)]
    band = score_band([one, two])
    assert [place for place, *_ in band] == [0, 100, 150]
    for found, expected in zip(band, [(0.2, 0.3, 0.4), (0.4, 0.4, 0.4), (0.4, 0.6, 0.8)], strict=True):
        assert found[1:] == pytest.approx(expected)


def test_against_rl_is_paired_by_seed():
    found = against({0: FST, 7: FST}, {0: RL, 8: RL}, 100)
    (pair,) = found["pairs"]
    assert (pair["seed"], pair["target"], pair["rl_rollouts"], pair["rollouts"]) == (0, 0.58, 200, 100)
    assert pair["ratio"] == 0.5
    assert pair["kl_ratio"] == pytest.approx(0.1 / 0.4)
    assert (found["reached"], found["of"]) == (1, 1)


def test_seeds_that_never_reach_rls_best_are_counted_and_left_out_of_the_means():
    found = against({0: FST, 1: FST[:2]}, {0: RL, 1: RL}, 100)
    assert [pair["rollouts"] for pair in found["pairs"]] == [100, None]
    assert found["pairs"][1]["ratio"] is None and found["pairs"][1]["kl"] is None
    assert (found["reached"], found["of"]) == (1, 2)
    assert found["ratio"]["mean"] == 0.5 and found["ratio"]["n"] == 1


def test_an_rl_that_never_moves_gives_no_ratio():
    found = against({0: FST}, {0: [Point(0, 0.2, 0.0), Point(100, 0.1, 0.3)]}, 100)
    assert found["pairs"][0]["rollouts"] == 0
    assert found["pairs"][0]["ratio"] is None and found["ratio"] is None


def test_signal_is_read_from_the_first_and_the_last_steps():
    def step(flat, entropy):
        return {"kind": "step", "groups": 4, "flat_groups": flat, "entropy": entropy}

    lines = [step(0, 0.6), step(2, 0.4), *[step(1, 0.2)] * 8, *[step(4, 0.0)] * 3, *[step(1, 0.1)] * 3]
    assert signal_left(lines) == pytest.approx(
        {
            "flat_start": (0 + 2 + 4 * 1) / 24,
            "entropy_start": (0.6 + 0.4 + 4 * 0.2) / 6,
            "flat_end": (3 * 4 + 3 * 1) / 24,
            "entropy_end": 0.1,  # steps whose groups were all flat did not train
        }
    )


def test_without_slow_steps_there_is_no_signal_to_speak_of():
    assert signal_left([{"kind": "fast"}]) is None


def test_evaluations_between_a_fast_round_and_its_steps_are_not_cycle_ends():
    def line(kind, cycle, name):
        return {"kind": kind, "cycle": cycle, "name": name}

    lines = [
        line("eval", 0, "start"),
        line("fast", 0, "round"),
        line("eval", 0, "prompts"),
        line("step", 0, "step"),
        line("eval", 0, "end"),
        line("fast", 1, "round"),
        line("step", 1, "step"),
        line("eval", 1, "end"),
        line("fast", 2, "round without steps, as gepa's are"),
        line("eval", 2, "end"),
    ]
    assert [one["name"] for one in at_cycle_ends(lines) if one["kind"] == "eval"] == ["start", "end", "end", "end"]


@pytest.mark.parametrize("method", METHODS)
def test_every_cycle_of_a_real_run_has_its_end_on_the_curve_and_the_display_says_the_same(tmp_path, scripted, method):
    said = []

    class Kept(Display):
        def write(self, line):
            said.append(line)

    values = {"method": method, "budget.max_cycles": 3, "budget.max_rollouts": 130}
    with closing(scripted(answer)) as policy:
        result = run_toy(tmp_path / "run", policy, values=values, callbacks=[Kept()], progress=False)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    ends = [line for line in at_cycle_ends(lines) if line["kind"] == "eval"]

    # What the display says of each evaluation, in order, is read from the phases: an independent account of the place.
    places = [line.split("] ")[1].split(":")[0] for line in said if "val score" in line]
    assert len(places) == len(evaluations)
    between = [line for line, place in zip(evaluations, places, strict=True) if place.endswith("new prompts")]
    assert bool(between) is (method != "rl")
    with_steps = {line["cycle"] for line in lines if line["kind"] == "step"}
    assert [line for line in evaluations if line not in ends] == [
        line for line in between if line["cycle"] in with_steps
    ]
    for line, place in zip(evaluations, places, strict=True):
        if place.startswith("after"):
            assert place == f"after cycle {line['cycle'] + 1} of 3" and line in ends
    assert [line["cycle"] for line, place in zip(evaluations, places, strict=True) if place.startswith("after")] == [
        *range(result["cycles"])
    ]
    # So the end of the run is on both curves, whatever the method.
    assert curve_of(at_cycle_ends(lines))[-1] == curve_of(lines)[-1]
    assert curve_of(at_cycle_ends(lines))[-1].rollouts == result["rollouts"]["fast"] + result["rollouts"]["slow"]


def test_a_search_is_told_by_its_rounds_and_by_the_groups_across_prompts():
    def fast(cycle, accepted, population):
        return {"kind": "fast", "cycle": cycle, "accepted": accepted, "population": population}

    def step(groups, mixed):
        return {"kind": "step", "groups": groups, "mixed_groups": mixed}

    lines = [fast(0, 2, 2), step(4, 4), step(4, 4), {"kind": "eval"}, fast(1, 1, 1), step(4, 0), fast(2, 3, 3)]
    assert search_of(lines) == {
        "rounds": 3,
        "accepted_first": 2,
        "accepted_later": 4,
        "population": 2.0,
        "mixed": pytest.approx(8 / 12),
    }
    assert search_of([{"kind": "step", "groups": 4, "flat_groups": 1}])["mixed"] == 0.0  # a run of before
    assert search_of([])["population"] is None and search_of([])["mixed"] is None
