"""Rounds with `fast.accept="paired"` and `fast.merge`: what they run and take, and that they resume to the same."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.config.run import FastConfig
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.types import Candidate, Population, Rollout
from helpers.rounds import GOOD, RULES, SEED, Lossy, Scripted, World, fast, items, numbered
from helpers.toy import Reflection, answer, assert_same_run, run_toy

PAIRED = FastConfig(accept="paired", patience=0, max_proposals=1)


class Lucky(World):
    """A text gets the score that is set for it, on the examples that are set for it; 0 elsewhere."""

    def __init__(self, scores, **more):
        super().__init__(**more)
        self.scores = scores

    def rollout(self, candidate, item, capture):
        found = vars(super().rollout(candidate, item, capture))
        right = self.scores.get(candidate.texts["first"], lambda item: 0.0)(item.id)
        return Rollout(**{**found, "score": right, "predictor_scores": {}})


def minibatch_of(config, seed=0):
    """The examples that the first proposal of a round reads."""
    world = World()
    fast(world, reflector=Scripted("Read."), config=config, seed=seed)
    return [name for candidate, name in world.runs if candidate != SEED.id]


@pytest.mark.parametrize("accept", ["sum", "paired"])
def test_a_text_for_the_examples_that_were_read_is_taken_by_their_sum_and_not_by_a_paired_test(accept):
    read = minibatch_of(FastConfig(max_proposals=1))
    world = Lucky({"Fits.": lambda name: float(name in read)})
    found = fast(world, reflector=Scripted("Fits."), config=PAIRED.model_copy(update={"accept": accept}))
    if accept == "sum":
        assert (found.accepted, found.rollouts) == (1, 32)
        return
    # Four examples read, all better; then fresh ones, all equal. After all sixteen: (1-s)^4 (1+s/3)^12 is far below 5,
    # so it is open, and better by its sum: what it fixed is no loss elsewhere.
    assert found.rollouts == 32 and found.accepted == 1


def test_a_text_that_breaks_more_than_it_fixes_is_taken_by_the_sum_and_given_up_by_a_paired_test():
    read = minibatch_of(FastConfig(max_proposals=1))
    breaks = {"Breaks.": lambda name: float(name in read), SEED.texts["first"]: lambda name: float(name not in read)}
    by_sum = fast(Lucky(breaks), reflector=Scripted("Breaks."), config=PAIRED.model_copy(update={"accept": "sum"}))
    paired = fast(Lucky(breaks), reflector=Scripted("Breaks."), config=PAIRED)
    assert (by_sum.accepted, by_sum.rollouts) == (1, 32)
    # Four examples better by 1, then fresh ones worse by 1: by then a stake of s has (1 - s)^4 (1 + 5 s / 3)^n.
    # n = 4: 1.27, .71, .10 and 0; n = 8: 5.13, 7.97, 2.56 and 0, mean 3.92; n = 12: 20.7, 90.1, 65.7 and 0.
    assert (paired.accepted, paired.rollouts) == (0, 32)
    child = Candidate({**SEED.texts, "first": "Breaks."}).id
    assert paired.notes[-2] == f"candidate {child}: no better on 16 examples, by -0.500 on average"


def test_a_better_text_that_its_minibatch_does_not_show_is_found_by_drawing_more():
    read = minibatch_of(FastConfig(max_proposals=1))
    world = {"Later.": lambda name: float(name not in read)}
    by_sum = PAIRED.model_copy(update={"accept": "sum"})
    assert fast(Lucky(world), reflector=Scripted("Later."), config=by_sum).accepted == 0
    found = fast(Lucky(world), reflector=Scripted("Later."), config=PAIRED)
    child = Candidate({**SEED.texts, "first": "Later."}).id
    # 4 examples without a difference, then 4 fresh ones that are better: a wealth of 8.22. Then the rest of the anchor.
    assert (found.accepted, found.rollouts, found.best_score) == (1, 32, 0.75)
    assert f"candidate {child}: better on 8 examples, by +0.500 on average" in found.notes


def test_no_difference_is_given_up_after_eight_of_sixteen():
    found = fast(reflector=numbered(), config=PAIRED.model_copy(update={"max_proposals": 3}))
    assert (found.proposals, found.accepted, found.rollouts) == (3, 0, 16 + 3 * 8)


def test_proposals_in_flight_draw_their_examples_as_one_batch():
    world, sizes = World(), []

    class Counting(World):
        def __call__(self, candidate, items, *, capture):
            sizes.append((candidate.id, len(items)))
            return world(candidate, items, capture=capture)

    config = PAIRED.model_copy(update={"max_proposals": 3, "parallel_proposals": 3})
    found = fast(Counting(), reflector=numbered(), config=config)
    assert found.rollouts == 16 + 3 * 8
    order = [name for name, _ in sizes[1:]]
    assert order[:3] == order[3:] and len(set(order)) == 3  # three minibatches, then three times more


def test_a_sampled_round_pays_for_what_it_draws_and_scores_the_anchor_afresh():
    world = World()
    config = PAIRED.model_copy(update={"temperature": 1.0})
    found = fast(world, reflector=Scripted(GOOD.texts["first"]), config=config)
    # 16 to rescore, the parent's minibatch, the proposal's, 4 more of it (which decide), and the anchor. .5 better each
    # time is a wealth of 2.9 after four and 4.7 after six: so it takes 8.
    assert found.accepted == 1
    assert found.rollouts == len(world.runs) == 16 + 4 + 4 + 8 + 16


@pytest.mark.parametrize(("limit", "proposals"), [(55, 0), (56, 1)])
def test_a_sampled_proposal_starts_only_where_all_that_it_may_draw_is_left(limit, proposals):
    # 16 to rescore; then two minibatches of 4, up to the 16 of the anchor to draw, and 16 to score it.
    config = PAIRED.model_copy(update={"temperature": 1.0, "max_rollouts": limit})
    found = fast(reflector=Scripted(GOOD.texts["first"]), config=config)
    assert (found.proposals, found.accepted) == (proposals, proposals)
    assert found.notes[-1] == ("ended: max_proposals" if proposals else "ended: the rollout budget")


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 120),
    minibatch=st.integers(1, 6),
    temperature=st.sampled_from((0.0, 1.0)),
    size=st.integers(1, 12),
    olds=st.integers(1, 4),
    parallel=st.integers(1, 5),
    accept=st.sampled_from(("sum", "paired")),
    lost=st.integers(0, 4),
)
def test_the_budget_is_never_passed(limit, minibatch, temperature, size, olds, parallel, accept, lost):
    names = [Candidate({**SEED.texts, "first": f"Old {number}."}) for number in range(olds)]
    names.append(Candidate({**SEED.texts, "second": f"Old. {RULES['second']}"}))
    world = Lossy([(one, range(lost)) for one in names[::2]], times=1)
    config = FastConfig(
        max_rollouts=limit,
        minibatch=minibatch,
        temperature=temperature,
        parallel_proposals=parallel,
        accept=accept,
        merge=True,
    )
    found = fast(world, Population(tuple(names)), anchor=items(size), config=config)
    assert len(world.runs) == found.rollouts <= limit
    assert len({frozenset(row) for row in found.population.scores.values()}) <= 1


# -- merges ----------------------------------------------------------------------------------------------------------

FIRST = Candidate({**SEED.texts, "first": GOOD.texts["first"]}, (SEED.id,))
SECOND = Candidate({**SEED.texts, "second": GOOD.texts["second"]}, (SEED.id,))


class Halves(World):
    """Each rule is worth something on one half of the examples; both together are right everywhere."""

    def rollout(self, candidate, item, capture):
        found = super().rollout(candidate, item, capture)
        rules = [float(rule in candidate.texts[name]) for name, rule in RULES.items()]
        score = 1.0 if all(rules) else rules[int(item.id[6:]) % 2] * 0.5
        return Rollout(**{**vars(found), "score": score})


MERGE = FastConfig(merge=True, max_proposals=1)


def test_two_that_are_good_at_different_predictors_are_merged_first_thing():
    reflector = numbered()
    found = fast(Halves(), Population((FIRST, SECOND)), reflector, config=MERGE)
    best = found.population.best
    assert best.texts == GOOD.texts and found.best_score == 1.0
    assert (best.parents, best.origin, best.cycle) == ((FIRST.id, SECOND.id), "merge", 2)
    assert (found.proposals, found.accepted, found.reflection_calls) == (1, 1, 0)
    assert found.rollouts == 3 * 16
    merged = f"candidate {GOOD.id}, merged from {FIRST.id} and {SECOND.id}"
    assert found.notes == (f"{merged}, was accepted: 4 against 1 on 4 examples", "ended: nothing fails on the anchor")
    assert found.tried == (GOOD.id,)


def test_two_that_score_the_same_everywhere_are_merged_where_they_are_good_at_different_predictors():
    """Half of the score each: as whole programs one of them could be spared."""
    found = fast(population=Population((FIRST, SECOND)), reflector=numbered(), config=MERGE)
    assert found.population.best.origin == "merge" and found.best_score == 1.0
    assert "was accepted: 4 against 2 on 4 examples" in found.notes[0]


def test_without_the_setting_nothing_is_merged():
    found = fast(Halves(), Population((FIRST, SECOND)), numbered(), config=FastConfig(max_proposals=1))
    assert found.reflection_calls == 1 and found.accepted == 0


def test_what_was_merged_and_rejected_is_not_merged_again_and_the_search_goes_on():
    class Clash(Halves):
        def rollout(self, candidate, item, capture):
            found = super().rollout(candidate, item, capture)
            return Rollout(**{**vars(found), "score": 0.0}) if candidate.id == GOOD.id else found

    world = Clash()
    found = fast(world, Population((FIRST, SECOND)), numbered(), config=FastConfig(merge=True, max_proposals=3))
    assert (found.proposals, found.accepted, found.reflection_calls) == (3, 0, 2)
    assert sum(name == GOOD.id for name, _ in world.runs) == 4
    assert "was rejected: 0 against 1 on 4 examples" in found.notes[0]


def test_a_merge_is_due_again_after_what_is_accepted():
    """The first round of proposals finds each rule from the seed; the merge has both."""
    reflector = Scripted(lambda component, current: GOOD.texts[component])
    config = FastConfig(merge=True, max_proposals=6, parallel_proposals=2, patience=0)
    found = fast(Halves(), Population((SEED,)), reflector, config=config)
    assert found.best_score == 1.0 and found.population.best.origin == "merge"
    assert (found.proposals, found.accepted, found.reflection_calls) == (3, 3, 2)


def test_a_merge_that_was_lost_on_most_ends_the_round():
    found = fast(Lossy([(GOOD, range(16))]), Population((FIRST, SECOND)), numbered(), config=FastConfig(merge=True))
    assert (found.accepted, found.notes[-1]) == (0, "ended: the engine failed on more than half of what was asked")


def test_a_merge_is_compared_by_the_paired_test_too():
    found = fast(
        Halves(), Population((FIRST, SECOND)), numbered(), config=MERGE.model_copy(update={"accept": "paired"})
    )
    assert found.population.best.texts == GOOD.texts
    assert found.notes[0].startswith(f"candidate {GOOD.id}: better on ")


@pytest.mark.parametrize("place", [("reflection.answer", 2), ("rollout.end", 30)])
def test_a_run_with_everything_on_resumes_to_the_same(scripted, tmp_path, place):
    values = {
        **{"fast.parallel_proposals": 3, "fast.max_proposals": 4, "fast.max_rollouts": 60},
        **{"fast.accept": "paired", "fast.merge": True, "fast.temperature": 1.0, "fast.max_instruction_tokens": 90},
    }

    class Same(Reflection):
        """Says the same to the same prompt, in any order."""

        def __call__(self, prompt=None, messages=None, **kwargs):
            self.calls += 1
            return [f"```\nAnswer. {hashlib.sha256(prompt.encode()).hexdigest()[:6]}\n```"]

    def run(name, **options):
        return run_toy(tmp_path / name, scripted(answer), values=values, reflection_lm=Same(), **options)

    assert run("whole")["reflection_calls"] > 3
    with inject(place[0], raising(KeyboardInterrupt()), after=place[1]), pytest.raises(KeyboardInterrupt):
        run("killed")
    run("killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
