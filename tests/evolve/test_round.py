import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import FSTError, MetricError
from fst_optimizer.evolve.population import frontier
from fst_optimizer.types import Candidate, Outcome, Population, Rollout
from helpers.rounds import GOOD, RULES, SEED, Lossy, Scripted, World, fast, items, numbered


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("components", ["round_robin", "all"])
def test_both_rules_of_a_two_predictor_program_are_found_from_the_seed(seed, components):
    found = fast(seed=seed, config=FastConfig(components=components))
    best = found.population.best
    assert all(rule in best.texts[name] for name, rule in RULES.items())
    assert found.best_score == 1.0
    assert found.notes[-1] == "ended: nothing fails on the anchor"
    assert found.rollouts <= 192


def test_both_rules_are_found_with_sampled_rollouts_too():
    world = World()
    found = fast(world, config=FastConfig(temperature=1.0))
    assert found.best_score == 1.0
    assert found.reused == 0
    assert found.rollouts == len(world.runs)


def test_greedy_rollouts_are_run_once_and_reused():
    world = World()
    found = fast(world)
    assert len(world.runs) == len(set(world.runs)) == found.rollouts
    # Seed and two accepted children on 16 examples each, if no proposal was rejected.
    assert (found.proposals, found.accepted, found.rollouts) == (2, 2, 48)
    # Each proposal reuses its parent's minibatch and, once accepted, its own.
    assert found.reused == 16
    assert all(world.captures)


def test_lineage_is_real():
    found = fast()
    best = found.population.best
    (parent,) = best.parents
    assert (best.origin, best.cycle) == ("reflection", 2)
    assert parent not in (SEED.id, best.id)
    assert parent == Candidate({**best.texts, **_unlearned(best)}).id


def _unlearned(best):
    """The text of the component that the last mutation changed: round robin starts at cycle 2's component, first."""
    return {"second": SEED.texts["second"]}


def test_all_scores_are_new_and_cover_the_anchor_at_the_policy_version():
    stale = Population((SEED, GOOD), 1, {SEED.id: {"gone": 1.0}, GOOD.id: {"gone": 0.5}})
    found = fast(World(hard=["train-0"]), stale)
    assert found.population.policy_version == 3
    for candidate in found.population.candidates:
        assert set(found.population.scores[candidate.id]) == {item.id for item in items()}


def test_an_old_favourite_that_got_worse_loses_its_place():
    favourite = Candidate({**SEED.texts, "first": "Think hard."}, origin="reflection", cycle=0)
    old = Population((favourite, GOOD), 1, {favourite.id: {"train-0": 1.0}, GOOD.id: {"train-0": 0.0}})
    found = fast(population=old)
    assert [candidate.id for candidate in found.population.candidates] == [GOOD.id]
    assert found.population.candidates[0].origin == "given"


def test_the_population_is_the_frontier_up_to_k():
    class Specialists(World):
        def rollout(self, candidate, item, capture):
            mine = candidate.texts["first"] == item.id
            base = super().rollout(candidate, item, capture)
            return Rollout(**{**vars(base), "score": 0.5 if mine else 0.0})

    many = Population(tuple(Candidate({**SEED.texts, "first": f"train-{i}"}) for i in range(6)))
    found = fast(Specialists(), many, config=FastConfig(population=4, max_proposals=0))
    assert len(found.population.candidates) == 4
    assert len(found.frontier) == 6
    assert {candidate.id for candidate in found.population.candidates} <= set(found.frontier)


def test_fewer_than_k_when_one_leads_everywhere():
    found = fast(population=Population((SEED, GOOD)))
    assert found.frontier == (GOOD.id,)
    assert len(found.population.candidates) == 1
    assert (found.proposals, found.rollouts) == (0, 32)


def test_the_same_seed_gives_the_same_round_whatever_the_global_generator_did():
    hard = [f"train-{i}" for i in range(0, 16, 3)]
    random.seed(1)
    one = fast(World(hard=hard), seed=4, config=FastConfig(temperature=0.5))
    random.seed(2)
    other = fast(World(hard=hard), seed=4, config=FastConfig(temperature=0.5))
    assert one == other


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 120),
    left=st.none() | st.integers(0, 120),
    size=st.integers(1, 12),
    minibatch=st.integers(1, 6),
    temperature=st.sampled_from((0.0, 1.0)),
    olds=st.integers(1, 5),
    seed=st.integers(0, 3),
    parallel=st.integers(1, 7),
)
def test_the_budget_is_never_passed(limit, left, size, minibatch, temperature, olds, seed, parallel):
    world = World(hard=["train-1", "train-2"])
    config = FastConfig(max_rollouts=limit, minibatch=minibatch, temperature=temperature, parallel_proposals=parallel)
    olds = Population(tuple(Candidate({**SEED.texts, "first": f"Old {i}."}) for i in range(olds)))
    found = fast(world, olds, anchor=items(size), config=config, seed=seed, rollouts_left=left)
    allowed = limit if left is None else min(limit, left)
    assert len(world.runs) == found.rollouts <= allowed
    assert found.reused <= found.rollouts
    assert found.notes[-1].startswith("ended: ")
    assert 1 <= len(found.population.candidates) <= max(config.population, len(olds.candidates))
    if allowed:
        rows = found.population.scores.values()
        assert len({frozenset(row) for row in rows}) == 1
        assert set(found.frontier) >= set(frontier(found.population.scores))


HALF = Candidate({**SEED.texts, "second": GOOD.texts["second"]})
"""Right in its second part: .5 everywhere."""


def test_what_the_engine_failed_once_is_run_again_and_changes_nothing_else():
    clean = fast(population=Population((HALF, GOOD)))
    found = fast(Lossy([(GOOD, range(5))], times=1), Population((HALF, GOOD)))
    assert (found.population, found.lost) == (clean.population, 0)
    assert found.rollouts == clean.rollouts + 5


def test_a_lost_rollout_is_no_score_of_0_and_does_not_throw_out_the_best_prompt():
    """GOOD is right wherever it was answered: eight lost examples as zeros would make it .5, as good as HALF."""
    found = fast(Lossy([(GOOD, range(8))]), Population((HALF, GOOD)))
    assert found.population.best == GOOD and found.best_score == 1.0
    answered = {f"train-{number}" for number in range(8, 16)}
    assert {frozenset(row) for row in found.population.scores.values()} == {frozenset(answered)}
    assert (found.lost, found.rollouts) == (8, 32 + 8)
    assert found.notes[-2:] == (
        "8 of 16 anchor examples were left out: the engine failed on them",
        "ended: nothing fails on the anchor",
    )


def test_examples_that_different_candidates_lost_are_left_out_for_all():
    found = fast(Lossy([(GOOD, (1, 2)), (HALF, (2, 3, 4))]), Population((HALF, GOOD)), config=FastConfig(population=2))
    (row,) = {frozenset(row) for row in found.population.scores.values()}
    assert row == {f"train-{number}" for number in range(16) if number not in (1, 2, 3, 4)}


def test_with_less_than_half_of_the_anchor_the_round_ends_and_says_so():
    old = Population((HALF, GOOD), 1, {HALF.id: {"train-0": 0.5}, GOOD.id: {"train-0": 1.0}})
    found = fast(Lossy([(GOOD, range(9))]), old)
    assert found.population is old and found.lost == 9
    why = "ended: the engine failed on more than half of the 16 anchor examples; the population was not rescored"
    assert found.notes[-1] == why
    assert found.rollouts == 32 + 9 and found.proposals == 0


def good_next():
    return Scripted(lambda component, current: GOOD.texts[component])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_proposal_is_compared_on_what_was_answered_of_its_minibatch(temperature):
    """The parent has .5 on each of four, the proposal 1 on two and lost the rest: as zeros they would even it out."""
    settings = FastConfig(minibatch=4, anchor_size=4, temperature=temperature)
    found = fast(Lossy([(GOOD, (0, 1))]), Population((HALF,)), good_next(), items(4), config=settings)
    assert found.accepted == 1 and found.population.best.id == GOOD.id
    assert (found.lost, found.best_score) == (2, 1.0)
    assert {frozenset(row) for row in found.population.scores.values()} == {frozenset({"train-2", "train-3"})}


def test_a_proposal_with_too_few_answers_ends_the_round_and_is_not_taken():
    settings = FastConfig(minibatch=4, anchor_size=4)
    found = fast(Lossy([(GOOD, (0, 1, 2))]), Population((HALF,)), good_next(), items(4), config=settings)
    assert (found.proposals, found.accepted, found.population.candidates) == (1, 0, (HALF,))
    assert found.notes[-1] == "ended: the engine failed on more than half of what was asked"
    assert found.outlook == "open"


def test_a_proposal_that_is_lost_on_most_of_the_anchor_is_not_taken():
    settings = FastConfig(minibatch=2, anchor_size=16, max_proposals=1)
    world = World()
    fast(world, Population((HALF,)), good_next(), config=settings)
    minibatch = [name for candidate, name in world.runs if candidate == GOOD.id][:2]
    others = [number for number in range(16) if f"train-{number}" not in minibatch]
    found = fast(Lossy([(GOOD, others[:9])]), Population((HALF,)), good_next(), config=settings)
    assert (found.accepted, found.population.candidates, found.lost) == (0, (HALF,), 0)
    assert len(found.population.scores[HALF.id]) == 16


@pytest.mark.parametrize(
    ("more", "outlook"),
    [
        ({"components": ()}, "closed"),
        ({"config": FastConfig(max_proposals=0)}, "closed"),
        ({"reflector": numbered, "reflections_left": 2}, "closed"),
        ({}, "barren"),  # both rules are found, nothing is left to fail
        ({"population": Population((GOOD,))}, "barren"),
        ({"reflector": lambda: Scripted(None)}, "barren"),
        ({"reflector": lambda: Scripted(lambda component, current: current)}, "barren"),
        ({"reflector": numbered}, "open"),  # unlucky: every text was new, and rejected
        ({"reflector": lambda: Scripted("Always the same.")}, "open"),
        ({"reflector": lambda: Scripted(RuntimeError("busy"))}, "open"),
        ({"reflector": numbered, "halted": lambda: True}, "open"),
        # One part is found in all the proposals there are.
        ({"config": FastConfig(max_proposals=1)}, "open"),
    ],
)
def test_what_a_round_says_of_later_ones(more, outlook):
    if make := more.get("reflector"):
        more = {**more, "reflector": make()}
    assert fast(**more).outlook == outlook


def test_texts_that_earlier_rounds_have_tried_are_nothing_new():
    first = fast(reflector=Scripted("One.", "Two."))
    assert len(first.tried) == 2 and first.outlook == "open"
    again = fast(reflector=Scripted("One.", "Two."), tried=first.tried)
    assert (again.outlook, again.tried) == ("barren", ()) and again.proposals == first.proposals
    assert fast(reflector=Scripted("One.", "Three."), tried=first.tried).outlook == "open"


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 120),
    minibatch=st.integers(1, 6),
    temperature=st.sampled_from((0.0, 1.0)),
    olds=st.integers(1, 4),
    share=st.sampled_from((0.05, 0.3, 0.7)),
    seed=st.integers(0, 30),
    parallel=st.integers(1, 5),
)
def test_the_budget_is_never_passed_and_means_are_over_the_same_examples_whatever_is_lost(
    limit, minibatch, temperature, olds, share, seed, parallel
):
    rng = random.Random(seed)

    class Flaky(World):
        def rollout(self, candidate, item, capture):
            found = super().rollout(candidate, item, capture)
            if rng.random() < share:
                return Rollout(candidate.id, item.id, 0, 0, Outcome.ENGINE_ERROR, 0.0)
            return found

    world = Flaky(hard=["train-1"])
    config = FastConfig(max_rollouts=limit, minibatch=minibatch, temperature=temperature, parallel_proposals=parallel)
    olds = Population(tuple(Candidate({**SEED.texts, "first": f"Old {i}."}) for i in range(olds)))
    found = fast(world, olds, config=config, seed=seed)
    assert len(world.runs) == found.rollouts <= limit
    assert len({frozenset(row) for row in found.population.scores.values()}) <= 1
    if found.population is not olds:
        assert all(len(row) >= min(limit, 16) / 2 for row in found.population.scores.values())


def test_a_budget_for_some_of_the_old_candidates_rescores_the_formerly_best():
    old = Population((SEED, GOOD), 1, {SEED.id: {"train-0": 0.2}, GOOD.id: {"train-0": 0.9}})
    found = fast(population=old, config=FastConfig(max_rollouts=20))
    assert found.population.candidates == (GOOD,)
    assert found.notes[0] == "rescored 1 of 2 candidates, all that the budget pays"


def test_a_budget_below_one_candidate_cuts_the_anchor():
    found = fast(rollouts_left=5)
    assert found.rollouts == 5
    assert list(found.population.scores[SEED.id]) == [f"train-{i}" for i in range(5)]
    assert found.notes == ("anchor cut from 16 to 5 examples, all that the budget pays", "ended: the rollout budget")


def test_with_nothing_left_the_population_comes_back_as_it_was():
    old = Population((SEED, GOOD), 1, {SEED.id: {"train-0": 0.2}, GOOD.id: {"train-0": 0.9}})
    world = World()
    found = fast(world, old, rollouts_left=0)
    assert found.population is old
    assert (found.rollouts, found.best_score, world.runs) == (0, 0.9, [])


def test_patience_ends_a_fruitless_round():
    found = fast(reflector=numbered(), config=FastConfig(patience=3))
    assert (found.proposals, found.accepted) == (3, 0)
    assert found.notes[-1] == "ended: patience"
    assert found.rollouts == 16 + 3 * 4
    assert found.population.candidates == (SEED,)


def test_no_patience_means_all_proposals():
    found = fast(reflector=numbered(), config=FastConfig(patience=0, max_proposals=7))
    assert found.proposals == 7
    assert found.notes[-1] == "ended: max_proposals"


def test_no_proposals_only_rescores():
    found = fast(config=FastConfig(max_proposals=0))
    assert (found.proposals, found.rollouts, found.reflection_calls) == (0, 16, 0)


def test_without_components_only_rescores():
    assert fast(components=()).notes == ("ended: no component may change",)


def test_only_the_named_components_change():
    for which in ("round_robin", "all"):
        found = fast(components=("second",), config=FastConfig(components=which))
        best = found.population.best
        assert best.texts["first"] == SEED.texts["first"]
        assert RULES["second"] in best.texts["second"]


def test_nothing_to_learn_from_costs_nothing():
    """The only failing component may not change, so no proposal is ever made."""
    half = Candidate({**SEED.texts, "second": GOOD.texts["second"]})
    reflector = numbered()
    found = fast(population=Population((half,)), reflector=reflector, components=("second",))
    assert (found.proposals, found.rollouts, reflector.calls) == (0, 16, 0)
    assert found.notes[-1] == "ended: no minibatch showed a failure to reflect on"


def test_reflections_left_is_never_passed():
    for left in range(4):
        reflector = numbered()
        found = fast(reflector=reflector, reflections_left=left, config=FastConfig(components="all"))
        assert reflector.calls == found.reflection_calls == left
        assert found.notes[-1] == "ended: no reflections left"


@pytest.mark.parametrize("answer", [RuntimeError("refused"), None, "", "   ", 7])
def test_a_failing_reflection_costs_the_proposal_not_the_run(answer):
    found = fast(reflector=Scripted(answer), config=FastConfig(patience=2))
    assert (found.proposals, found.accepted, found.rollouts, found.reflection_calls) == (2, 0, 16, 2)
    assert found.population.candidates == (SEED,)
    assert len(found.notes) == 3


def test_a_raising_reflector_warns_once(caplog):
    with caplog.at_level("WARNING"):
        found = fast(reflector=Scripted(RuntimeError("refused")))
    assert len(caplog.records) == 1
    assert "RuntimeError: refused" in caplog.text
    assert "no new text for first: RuntimeError: refused" in found.notes


def test_a_round_goes_on_after_a_failed_reflection():
    flaky = Scripted(RuntimeError("busy"), lambda component, current: f"{current} {RULES[component]}")
    assert fast(reflector=flaky).best_score == 1.0


def test_the_same_texts_are_not_run_twice():
    world = World()
    found = fast(world, reflector=Scripted("Always the same."), config=FastConfig(patience=6, components="all"))
    assert found.rollouts == 16 + 4
    assert sum("proposed again" in note for note in found.notes) == 5


def test_the_old_text_again_is_no_new_candidate():
    found = fast(reflector=Scripted(lambda component, current: current), config=FastConfig(patience=2))
    assert found.rollouts == 16


def test_an_anchor_smaller_than_the_minibatch_and_repeated_items():
    few = items(3)
    found = fast(anchor=(*few, few[0]), config=FastConfig(minibatch=8))
    assert found.best_score == 1.0
    assert len(next(iter(found.population.scores.values()))) == 3


def test_an_empty_anchor_changes_nothing():
    assert fast(anchor=()).notes == ("ended: the anchor is empty; the population was not rescored",)


def test_feedback_is_captured_only_where_it_is_read():
    world = World()
    fast(world, config=FastConfig(temperature=1.0, max_proposals=1))
    # Rescoring, the parent's minibatch, the child's minibatch, the child on the anchor.
    assert world.captures == [False, True, True, False]


def test_a_broken_metric_raises_through():
    class Broken(World):
        def __call__(self, candidate, items, *, capture):
            if candidate.id != SEED.id:
                raise MetricError("the metric raised")
            return super().__call__(candidate, items, capture=capture)

    with pytest.raises(MetricError):
        fast(Broken())


def test_rollouts_of_other_examples_are_refused():
    class Short(World):
        def __call__(self, candidate, items, *, capture):
            return super().__call__(candidate, items[1:], capture=capture)

    with pytest.raises(FSTError, match="asked for examples"):
        fast(Short())


def test_rollouts_may_come_back_in_any_order():
    class Shuffled(World):
        def __call__(self, candidate, items, *, capture):
            return super().__call__(candidate, list(reversed(items)), capture=capture)

    assert fast(Shuffled()).population == fast().population


def test_what_the_metric_leaves_unsaid_is_no_lesson():
    found = fast(World(feedback=False))
    assert found.accepted == 0
    assert found.population.candidates == (SEED,)
