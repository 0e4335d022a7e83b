"""Where the next rollouts go, on made-up histories worked by hand."""

from dataclasses import replace
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.run.allocation import (
    FLOOR,
    WINDOW,
    Allocation,
    Ledger,
    Means,
    after_round,
    after_step,
    after_switch,
    decide,
    posteriors,
    under_others,
    worn_out,
)
from fst_optimizer.run.gains import Evidence
from fst_optimizer.types import Candidate

MEANS = Means(
    rollouts=4000,
    round_rollouts=192,
    proposals=12,
    examples=16,
    candidates=2,
    steps=6,
    step_rollouts=64,
    version=3,
    kl=0.0,
)
DRAWS = [f"draw {number}" for number in range(400)]
ANCHOR = [f"train-{number}" for number in range(16)]


def row(mean):
    """Scores on the anchor, half of them .1 above the mean and half below."""
    return {name: mean + (0.1 if place % 2 else -0.1) for place, name in enumerate(ANCHOR)}


def rounds(ledger, *gains, rollouts=96, accepted=1, outlook="open", version=3, kl=0.0):
    """After fast rounds whose best prompt was so much better than the one before."""
    for number, gain in enumerate(gains):
        scores = {"seed": row(0.2), "old": row(0.4)} | ({f"new {number}": row(0.4 + gain)} if accepted else {})
        how = {"rollouts": rollouts, "accepted": accepted, "outlook": outlook, "version": version, "kl": kl}
        ledger = after_round(replace(ledger, now=None), scores, ["seed", "old"], "seed", **how)
    return ledger


def steps(ledger, count, start, rise, *, updated=True):
    """After so many slow steps of 64 rollouts on 8 examples, whose reward rises by so much a step."""
    for number in range(count):
        spent = ledger.spent_weights + 64
        rewards = {f"e{place}": start + rise * number + (0.1 if place % 2 else -0.1) for place in range(8)}
        ledger = after_step(ledger, rewards, (), rollouts=64, spent=spent, updated=updated)
    return ledger


def share_of_prompts(ledger, means=MEANS):
    """How often the draw goes to the prompts."""
    return sum(decide(ledger, means, draw).steps == 0 for draw in DRAWS) / len(DRAWS)


def test_prompts_come_first():
    assert decide(Ledger(), MEANS, "x") == Allocation(12, 16, 0, "nothing is known of the prompts yet")


def test_prompts_go_on_while_they_climb():
    # .4 in 96 rollouts: 4.2 in a thousand, where a cycle of steps is expected to bring .13, give or take .26.
    ledger = rounds(Ledger(), 0.4)
    prompts, weights = posteriors(ledger, MEANS)
    assert 1000 * weights.mean == pytest.approx(50 / 384) and 1000 * weights.stdev == pytest.approx(100 / 384)
    # The gain's noise is .025 (no difference but the floor of .1, 16 examples); .41 of it is luck of one candidate.
    gained = Evidence().plus(0.4 - 0.025 * NormalDist().inv_cdf(1.625 / 2.25) / 2**0.5, 0.025, 96).posterior(192)
    assert (prompts.mean, prompts.stdev) == (pytest.approx(gained.mean), pytest.approx(gained.stdev))
    assert share_of_prompts(ledger) > 0.99
    assert decide(ledger, MEANS, "x").proposals == 12


def test_weights_have_their_turn_when_prompts_level_off_and_rewards_climb():
    ledger = steps(rounds(Ledger(), 0.4, 0.0, 0.0, 0.0, accepted=0), 6, 0.3, 0.03)
    # .03 in 64 rollouts are .47 in a thousand; the prompts brought nothing in the last three rounds.
    assert share_of_prompts(ledger) < 0.2
    found = next(one for one in (decide(ledger, MEANS, draw) for draw in DRAWS) if one.steps)
    assert (found.proposals, found.examples, found.steps) == (0, 0, 6)
    assert found.reason.startswith("gain in 1,000 rollouts: prompts 0.")


def test_where_the_noise_is_larger_than_the_gain_both_sides_are_tried_by_half():
    ledger = rounds(Ledger(), 0.05, rollouts=192)
    ledger = replace(ledger, prompts=Evidence().plus(0.05, 0.2, 192))
    assert 0.25 < share_of_prompts(ledger) < 0.8
    found = [decide(ledger, MEANS, draw) for draw in DRAWS]
    assert {(one.proposals, one.steps) for one in found} == {(6, 0), (0, 3)}


def test_the_draw_follows_from_its_seed():
    ledger = replace(rounds(Ledger(), 0.05), prompts=Evidence())
    assert decide(ledger, MEANS, "allocation/0/3") == decide(ledger, MEANS, "allocation/0/3")
    assert len({decide(ledger, MEANS, draw).reason for draw in DRAWS}) > 100


def test_prompts_are_worth_another_look_once_the_weights_have_moved():
    flat = steps(rounds(Ledger(), 0.0, 0.0, 0.0, accepted=0, rollouts=192), 6, 0.3, 0.02)
    still, moved = share_of_prompts(flat), share_of_prompts(flat, replace(MEANS, kl=0.2))
    assert still < 0.1 and moved > still + 0.1
    assert "the weights moved by 0.200 nats a token since" in decide(flat, replace(MEANS, kl=0.2), "x").reason


def test_a_switch_of_the_task_makes_all_gains_unknown_and_calls_for_a_fast_round():
    waiting = Candidate({"answer": "Say it twice."})
    ledger = after_switch(replace(steps(rounds(Ledger(), 0.0), 6, 0.3, 0.05), waiting=(waiting,), flat=("e1",)))
    assert decide(ledger, MEANS, "x") == Allocation(12, 16, 0, "a switch of the task was noticed")
    assert ledger.waiting == (waiting,) and not ledger.flat
    assert posteriors(ledger, MEANS) == posteriors(Ledger(), MEANS)
    assert not rounds(ledger, 0.0).switched


def test_where_both_sides_are_level_each_has_its_tenth():
    ledger = replace(rounds(Ledger(), 0.0), prompts=Evidence().plus(1.0, 0.01, 192))  # the draw is always for prompts
    assert decide(replace(ledger, spent_prompts=639), MEANS, "x").proposals
    found = decide(replace(ledger, spent_prompts=640), MEANS, "x")
    assert (found.proposals, found.steps) == (0, 1)
    assert found.reason == "the weights had 0 of 640 rollouts, and 10% are theirs"
    assert decide(replace(ledger, spent_prompts=1300), MEANS, "x").steps == 3  # 130 are owed
    starving = replace(ledger, prompts=Evidence().plus(-1.0, 0.01, 192), spent_prompts=32, spent_weights=608)
    assert decide(starving, MEANS, "x").reason == "the prompts had 32 of 640 rollouts, and 10% are theirs"
    assert (decide(starving, MEANS, "x").proposals, decide(starving, MEANS, "x").steps) == (6, 0)


def test_a_round_that_found_nothing_new_is_not_repeated_under_the_same_weights():
    ledger = rounds(Ledger(), 0.0, outlook="barren")
    found = decide(ledger, MEANS, "x")
    why = "the last fast round had nothing new to try, and the weights are still version 3"
    assert found == Allocation(0, 0, 6, why)
    assert share_of_prompts(ledger, replace(MEANS, version=4)) > 0.2
    # Not even for their share of the rollouts; under other weights they get it.
    owed = replace(ledger, spent_prompts=0, spent_weights=2000)
    assert decide(owed, MEANS, "x").reason == why
    assert decide(owed, replace(MEANS, version=4), "x").examples == 16


def test_where_nothing_can_be_proposed_only_the_share_of_the_prompts_is_left_for_scoring_them_again():
    ledger = rounds(Ledger(), 0.0, outlook="closed")
    means = replace(MEANS, proposals=0, version=9)
    assert ledger.closed and decide(ledger, means, "x") == Allocation(0, 0, 6, "nothing can be proposed any more")
    again = decide(replace(ledger, spent_weights=2000), means, "x")
    assert (again.proposals, again.examples, again.steps) == (0, 16, 0)


def test_steps_without_signal_give_the_prompts_their_turn():
    ledger = steps(rounds(Ledger(), 0.0), 6, 0.0, 0.0, updated=False)
    assert worn_out(ledger, 6)
    assert decide(ledger, MEANS, "x") == Allocation(12, 16, 0, "in 6 slow steps in a row every group was flat")
    assert not worn_out(steps(ledger, 1, 0.0, 0.0), 6)


def test_flat_examples_are_known_until_the_weights_or_the_prompts_change():
    flat = {"rollouts": 64, "spent": 64, "updated": False}
    once = after_step(Ledger(), {"a": 0.0, "b": 0.0}, ["a", "b"], **flat)
    twice = after_step(once, {"c": 0.0, "b": 0.0}, ["c", "b"], **flat)
    assert (twice.flat, twice.still) == (("a", "b", "c"), 2)
    assert after_step(twice, {"c": 0.0, "d": 1.0}, ["c"], **{**flat, "updated": True}).flat == ()
    assert (under_others(twice).flat, under_others(twice).still) == ((), 0)


def test_other_prompts_start_from_another_level_and_what_was_known_counts_half():
    ledger = steps(Ledger(), 6, 0.3, 0.03)
    before, after = posteriors(ledger, MEANS)[1], under_others(ledger)
    assert not after.points and after.weights.precision > 0
    prior = (384 / 0.1) ** 2
    assert after.weights.precision == pytest.approx((before.stdev**-2 - prior) / 2)
    jumped = steps(after, 1, 0.9, 0.0)  # a jump in reward by a better prompt is no gain of the weights
    assert posteriors(jumped, MEANS)[1] == posteriors(after, MEANS)[1]


def test_only_the_last_steps_are_looked_at():
    ledger = steps(steps(Ledger(), 30, 0.1, 0.02), WINDOW, 0.7, 0.0)
    assert len(ledger.points) == WINDOW
    assert 1000 * posteriors(ledger, MEANS)[1].mean == pytest.approx(0.0, abs=0.03)


def test_an_uncertain_lead_over_the_seed_is_looked_at_on_more_examples_before_weights_are_trained():
    ledger = replace(rounds(Ledger(), 0.0), prompts=Evidence().plus(-1.0, 0.01, 192), lead=(0.05, 0.06))
    found = decide(ledger, MEANS, "x")
    assert (found.proposals, found.examples) == (0, 32) and found.steps > 0
    assert found.reason.endswith(
        "; the best prompt leads the seed by 0.050 ± 0.060 only, so they are scored on 32 examples"
    )
    for other in ({"lead": (0.08, 0.06)}, {"lead": (-0.01, 0.06)}, {"lead": None}, {"compared": True}):
        assert decide(replace(ledger, **other), MEANS, "x").examples == 0
    assert decide(ledger, replace(MEANS, rollouts=127), "x").examples == 0  # 2 x 32 and a step are more
    # And what a round that only scored says of it stands.
    compared = replace(ledger, now=found)
    how = {"rollouts": 64, "accepted": 0, "outlook": "closed", "version": 3, "kl": 0.0}
    after = after_round(compared, {"seed": row(0.2), "new": row(0.3)}, ["seed", "new"], "seed", **how)
    assert after.compared and not after.closed and after.prompts == ledger.prompts
    assert after.lead == (pytest.approx(0.1), pytest.approx(0.025))


def test_a_round_in_which_nothing_could_be_scored_says_nothing_of_the_prompts():
    how = {"rollouts": 8, "accepted": 0, "outlook": "open", "version": 3, "kl": 0.0}
    after = after_round(Ledger(), {}, ["seed"], "seed", **how)
    assert (after.prompts, after.lead, after.spent_prompts) == (Evidence(), None, 8)


def test_what_pays_for_no_step_goes_to_the_prompts_if_anything():
    known = rounds(Ledger(), 0.0)
    assert decide(known, replace(MEANS, rollouts=63), "x").reason == (
        "63 rollouts are left, too few for a slow step (64)"
    )
    assert decide(known, replace(MEANS, rollouts=63), "x").examples == 16
    nothing = decide(known, replace(MEANS, rollouts=31), "x")
    assert (nothing.proposals, nothing.examples, nothing.steps) == (0, 0, 0)
    assert decide(known, replace(MEANS, round_rollouts=31), "x").steps == 6
    barren = rounds(Ledger(), 0.0, outlook="barren")
    assert decide(barren, replace(MEANS, rollouts=63), "x").examples == 0


def test_a_ledger_survives_json():
    ledger = steps(rounds(Ledger(now=Allocation(6, 16, 0, "why")), 0.1), 3, 0.2, 0.1)
    ledger = replace(ledger, waiting=(Candidate({"answer": "Say it."}),), flat=("e1",), lead=(0.1, 0.2))
    assert Ledger.from_json(ledger.to_json()) == ledger


EVENTS = st.lists(
    st.tuples(st.floats(-1, 1), st.sampled_from(["open", "barren", "closed"]), st.booleans(), st.floats(0, 2)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(0, 6000), st.integers(0, 12), st.integers(1, 8), st.integers(1, 5))
def test_whatever_happens_nothing_is_negative_over_the_budget_or_starved(events, budget, proposals, length, candidates):
    ledger, left, version, spent = Ledger(), budget, 0, {"prompts": 0, "weights": 0}
    for number, (gain, outlook, updated, kl) in enumerate(events):
        means = replace(
            MEANS,
            rollouts=left,
            proposals=0 if ledger.closed else proposals,
            steps=length,
            candidates=candidates,
            version=version,
            kl=kl,
        )
        found = decide(ledger, means, f"{number}")
        assert min(found.proposals, found.examples, found.steps) >= 0 and found.reason
        assert found.proposals <= means.proposals and found.steps <= length
        assert found.proposals == 0 or found.examples
        rescored = found.examples * candidates
        assert rescored <= means.round_rollouts and rescored + 64 * found.steps <= left
        if not (found.examples or found.steps):
            assert left < 64
            break
        # The prompts have their turn as soon as a phase is owed to them that would not repeat the last one.
        owed = FLOOR * sum(spent.values()) - spent["prompts"]
        repeats = version == ledger.round_version and (ledger.barren or not means.proposals)
        assert found.examples or not means.rescoring <= owed or repeats or means.rescoring > 192 or left < 64 + 192
        ledger = replace(ledger, now=found)
        if found.examples:
            cost = min(rescored + 4 * found.proposals, 192, left - 64 * found.steps)
            scores = {"seed": row(0.3), "new": row(0.3 + gain / 2)}
            how = {"rollouts": cost, "accepted": int(gain > 0), "outlook": outlook, "version": version, "kl": kl}
            ledger = after_round(ledger, scores, ["seed"], "seed", **how)
            left, spent["prompts"] = left - cost, spent["prompts"] + cost
        for _ in range(found.steps):
            ledger = steps(ledger, 1, 0.3, gain, updated=updated)
            left, version, spent["weights"] = left - 64, version + updated, spent["weights"] + 64
        # The weights can always be trained: they never lag behind their share by more than what one phase takes.
        assert FLOOR * sum(spent.values()) - spent["weights"] <= 64 + FLOOR * 192
