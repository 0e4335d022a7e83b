import pytest

from fst_optimizer.lab.verdicts import cells_of, evaluated_on_the_way, share_ci, shares, verdicts_of
from helpers.rows import CURVES, row, rows_of

RULES = "abcde"
FST = dict(zip(RULES, (0.9, 0.8, 0.7, 0.9, 1.0), strict=True))
RL = dict(zip(RULES, (0.8, 0.6, 0.4, 0.5, 0.5), strict=True))


def only(rows):
    cells, further = cells_of(rows)
    assert not further
    (cell,) = cells
    return cell


def test_a_verdict_is_over_rules_and_seeds_of_a_rule_are_averaged_first():
    # Two seeds of fst on rule a, .8 and 1.0, are one number, .9.
    rows = [*rows_of({"fst": FST, "rl": RL}), row("fst", 0.8, rule="a", seed=1), row("fst", 1.0, rule="a", seed=2)]
    difference, share = verdicts_of(only(rows))
    assert (difference.against, difference.outcome, difference.found["n"]) == ("rl", "won", 5)
    # The differences are .1, .2, .3, .4, .5: see the tests of the statistics.
    assert difference.found["mean"] == pytest.approx(0.3)
    assert difference.found["low"] == pytest.approx(0.103676, abs=1e-6)
    assert share.share and share.against == "rl"


def test_a_method_that_reads_no_feedback_stands_in_every_kind_once():
    shared = rows_of({"rl": RL, "sft": RL})
    rows = [*shared, *rows_of({"fst": FST}), *rows_of({"fst": RL}, kind="shown"), *rows_of({"fst": FST}, kind="scored")]
    cells, _ = cells_of([*rows, *shared])  # every kind's comparison holds the same runs
    assert [(cell.kind, list(cell.runs)) for cell in cells] == [
        ("told", ["fst", "rl", "sft"]),
        ("shown", ["fst", "rl", "sft"]),
        ("scored", ["fst", "rl", "sft"]),
    ]
    assert [len(cell.rows("rl")) for cell in cells] == [5, 5, 5]
    assert [verdicts_of(cell)[0].outcome for cell in cells] == ["won", "undecided", "won"]


def test_families_have_cells_of_their_own_and_runs_at_another_cap_stand_beside():
    long = row("rl", 0.9, rule="a", cap=10_000)
    cells, further = cells_of([*rows_of({"fst": FST, "rl": RL}), *rows_of({"fst": FST}, family="parcels"), long])
    assert [(cell.family, cell.cap, cell.unit) for cell in cells] == [
        ("letters", 300, "rule"),
        ("parcels", 300, "rule"),
    ]
    assert further == [long]


def test_with_one_rule_seeds_are_the_units():
    rows = [row(method, score, seed=seed) for method, score in (("fst", 0.8), ("rl", 0.5)) for seed in range(10, 13)]
    cell = only(rows)
    assert (cell.unit, cell.units) == ("seed", ["10", "11", "12"])
    assert verdicts_of(cell)[0].found["n"] == 3


def test_rls_best_is_reached_at_the_end_of_a_cycle_and_never_is_at_least_the_cap():
    rows = [row(method, rule=rule) for method in ("fst", "rl", "gepa", "sft") for rule in "ab"]
    cell = only(rows)
    # RL's best is .58 after 200. FST has .59 at 30, between a round and its steps, and .6 at the end of a cycle, at 60.
    assert shares(cell, "fst") == {"a": (0.3, True), "b": (0.3, True)}
    assert shares(cell, "gepa") == {"a": (1.5, False), "b": (1.5, False)}
    found = share_ci(cell, "gepa")
    assert (found["median"], found["median_at_least"], found["high"], found["reached"]) == (1.5, True, None, 0)
    assert [evaluated_on_the_way(cell, method) for method in cell.runs] == [True, True, True, False]


def test_a_search_that_ended_early_without_reaching_it_counts_as_the_whole_cap():
    early = row("gepa", curve=CURVES["gepa"][:2])
    cell = only([early, row("rl")])
    assert shares(cell, "gepa") == {"0": (1.5, False)}


def test_a_rule_on_which_rl_never_left_its_start_gives_no_share():
    still = [[0, 0.5, 0.0, 1], [100, 0.3, 0.1, 1], [300, 0.2, 0.1, 1]]
    cell = only([row(rule=rule) for rule in "ab"] + [row("rl", rule="a", curve=still), row("rl", rule="b")])
    assert shares(cell, "fst") == {"b": (0.3, True)}


def test_the_share_is_won_lost_or_undecided_by_its_whole_interval():
    def outcome(places):
        slow = [
            row(rule=rule, curve=[[0, 0.2, 0, 1], [10, 0.3, 0, 1], [place, 0.7, 0, 1]])
            for rule, place in zip(RULES, places, strict=True)
        ]
        (_, share) = verdicts_of(only([*slow, *rows_of({"rl": RL})]))
        return share.outcome

    assert outcome([20, 30, 40, 50, 60]) == "won"  # at most 60 of 200
    assert outcome([20, 30, 40, 50, 100]) == "undecided"
    assert outcome([80, 90, 100, 200, 300]) == "lost"


def test_without_fst_there_is_nothing_to_judge():
    assert verdicts_of(only(rows_of({"rl": RL, "gepa": RL}))) == []
