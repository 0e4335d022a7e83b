from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer.evolve.population import frontier, select
from fst_optimizer.types import Candidate, Population

EXAMPLES = ("x", "y", "z")
score_tables = st.lists(
    st.fixed_dictionaries({name: st.sampled_from((0.0, 0.5, 1.0)) for name in EXAMPLES}), min_size=1, max_size=6
).map(lambda rows: {f"c{index}": row for index, row in enumerate(rows)})


def mean(row):
    return sum(row.values()) / len(row)


def brute_force_frontier(scores):
    """Worst mean first and newest first among equals, drop whoever the others do without."""
    top = {example: max(row[example] for row in scores.values()) for example in EXAMPLES}

    def covers(names):
        return all(any(scores[name][example] == top[example] for name in names) for example in EXAMPLES)

    kept = {name for name, row in scores.items() if any(row[e] == top[e] for e in EXAMPLES)}
    for name in sorted(kept, key=lambda name: (mean(scores[name]), -int(name[1:]))):
        if covers(kept - {name}):
            kept -= {name}
    return sorted(kept, key=lambda name: (-mean(scores[name]), int(name[1:])))


def population(scores):
    candidates = tuple(Candidate({"only": name}, id=name) for name in scores)
    return Population(candidates, policy_version=7, scores=scores)


@given(score_tables)
def test_frontier_is_the_brute_force_one(scores):
    assert list(frontier(scores)) == brute_force_frontier(scores)


@given(score_tables)
def test_frontier_is_best_together_on_every_example_and_none_can_be_spared(scores):
    kept = frontier(scores)
    for example in EXAMPLES:
        assert max(scores[name][example] for name in kept) == max(row[example] for row in scores.values())
    for spared in kept:
        rest = [name for name in kept if name != spared]
        assert any(
            max((scores[name][e] for name in rest), default=-1) < max(row[e] for row in scores.values())
            for e in EXAMPLES
        )


@given(score_tables, st.integers(1, 4))
def test_select_keeps_the_best_mean_and_otherwise_only_the_frontier(scores, k):
    kept = select(population(scores), k)
    names = [candidate.id for candidate in kept.candidates]
    assert 1 <= len(names) <= k
    assert mean(scores[names[0]]) == max(map(mean, scores.values()))
    assert set(names[1:]) <= set(frontier(scores))
    assert [mean(scores[name]) for name in names] == sorted((mean(scores[name]) for name in names), reverse=True)
    assert kept.policy_version == 7
    assert kept.scores == {name: scores[name] for name in names}


def test_specialists_stay_beside_each_other():
    scores = {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 0.0, "y": 1.0}, "c": {"x": 0.0, "y": 0.0}}
    assert frontier(scores) == ("a", "b")


def test_of_two_equal_candidates_the_earlier_stays():
    assert frontier({"old": {"x": 1.0}, "new": {"x": 1.0}}) == ("old",)


def test_a_generalist_that_dominance_spares_is_kept_by_select():
    scores = {
        "left": {"1": 1.0, "2": 0.0, "3": 0.0, "4": 1.0, "5": 0.0},
        "right": {"1": 0.0, "2": 1.0, "3": 1.0, "4": 0.0, "5": 0.0},
        "all": {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.0, "5": 0.0},
        "most": {"1": 0.9, "2": 0.9, "3": 0.9, "4": 0.9, "5": -1.0},
    }
    assert "most" not in frontier(scores)
    assert select(population(scores), 2).candidates[0].id == "most"


def test_a_population_without_scores_keeps_its_first_candidate():
    unscored = Population((Candidate({"p": "a"}), Candidate({"p": "b"})))
    assert select(unscored, 4).candidates == (unscored.candidates[0],)
