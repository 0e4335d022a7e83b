"""Scores of a pair: over what was answered, each lost example tried twice."""

import pytest

from fst_optimizer.run.evaluate import evaluate
from fst_optimizer.types import Candidate, Item, Outcome, Rollout

CANDIDATE = Candidate({"answer": "Say it."})
ITEMS = [Item(f"val-{number}", None) for number in range(4)]


class Collector:
    """Fails examples so many times; all others score by their number."""

    def __init__(self, **lost):
        self.lost = {name.replace("_", "-"): times for name, times in lost.items()}
        self.asked = []

    def run_candidate(self, candidate, items, *, all_may_be_lost=False, **how):
        self.asked.append(([item.id for item in items], all_may_be_lost))
        return [self.rollout(item.id) for item in items]

    def rollout(self, name):
        self.lost[name] = self.lost.get(name, 0) - 1
        outcome = Outcome.ENGINE_ERROR if self.lost[name] >= 0 else Outcome.OK
        return Rollout(CANDIDATE.id, name, 0, 0, outcome, int(name[-1]) / 4 if outcome is Outcome.OK else 0.0)


def test_nothing_is_run_again_where_all_was_answered():
    collector = Collector()
    found = evaluate(collector, CANDIDATE, ITEMS, version=0)
    assert len(collector.asked) == 1
    assert (found.score, found.rollouts, found.failed, found.lost) == ((0 + 0.25 + 0.5 + 0.75) / 4, 4, 0, 0)


@pytest.mark.parametrize(
    ("times", "score", "lost", "failed"), [(1, (0 + 0.25 + 0.5 + 0.75) / 4, 0, 0), (2, (0 + 0.25) / 2, 2, 2)]
)
def test_what_was_lost_is_run_again_and_else_left_out(times, score, lost, failed):
    collector = Collector(val_2=times, val_3=times)
    found = evaluate(collector, CANDIDATE, ITEMS, version=0)
    assert collector.asked[1:] == [(["val-2", "val-3"], True)]
    assert (found.score, found.rollouts, found.failed, found.lost) == (score, 6, failed, lost)
    assert list(found.scores) == [item.id for item in ITEMS[: 4 - lost]]
    assert found.tally.outcomes == ({"ok": 2, "engine_error": 2} if lost else {"ok": 4})
