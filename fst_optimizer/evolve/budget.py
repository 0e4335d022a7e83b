"""The rollouts of a fast round: checked against its limit, and run once where a second run would repeat the first.

A rollout that the engine failed is run once more. If that is lost too, it stays lost: it is no score of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fst_optimizer.errors import FSTError
from fst_optimizer.types import Candidate, Item, Rollout


class Score(Protocol):
    """Runs one candidate at the current policy version."""

    def __call__(self, candidate: Candidate, items: Sequence[Item], *, capture: bool) -> Sequence[Rollout]:
        """One rollout per item; with `capture`, trace and feedback are filled in."""
        ...


class RolloutBudget:
    """Runs the rollouts of a round and counts them."""

    def __init__(self, score: Score, limit: int, *, reuse: bool) -> None:
        """`limit` rollouts may be executed. `reuse`: decoding is greedy, so that a rollout is run once only."""
        self.limit = limit
        self.reuse = reuse
        self.spent = 0
        self._score = score
        self._kept: dict[tuple[str, str], Rollout] = {}
        self._reused: set[tuple[str, str]] = set()

    @property
    def left(self) -> int:
        """Rollouts that may still be executed."""
        return self.limit - self.spent

    @property
    def reused(self) -> int:
        """Executed rollouts that served twice or more, each counted once."""
        return len(self._reused)

    def scores(self, candidate: Candidate, items: Sequence[Item], *, reserve: int = 0) -> dict[str, float]:
        """Example id -> the candidate's score, without the examples that the engine failed on."""
        rollouts = self.run(candidate, items, capture=False, reserve=reserve)
        return {rollout.example_id: rollout.score for rollout in rollouts if not rollout.lost}

    def run(self, candidate: Candidate, items: Sequence[Item], *, capture: bool, reserve: int = 0) -> list[Rollout]:
        """One rollout per item, in order; an item that comes twice in one call is run once.

        What is lost is run again, as far as `reserve` rollouts are left afterwards.
        """
        wanted = {item.id: item for item in items}
        found = {name: self._kept[candidate.id, name] for name in wanted if (candidate.id, name) in self._kept}
        self._reused.update((candidate.id, name) for name in found)
        missing = [item for name, item in wanted.items() if name not in found]
        if missing:
            assert len(missing) <= self.left, "callers check the budget before they spend it"
            fresh = self._execute(candidate, missing, capture or self.reuse)
            lost = [item for item in missing if fresh[item.id].lost]
            if again := lost[: max(0, self.left - reserve)]:
                fresh |= self._execute(candidate, again, capture or self.reuse)
            found |= fresh
            if self.reuse:
                self._kept.update({(candidate.id, name): rollout for name, rollout in fresh.items()})
        return [found[item.id] for item in items]

    def _execute(self, candidate: Candidate, items: Sequence[Item], capture: bool) -> dict[str, Rollout]:
        self.spent += len(items)
        rollouts = self._score(candidate, items, capture=capture)
        fresh = {rollout.example_id: rollout for rollout in rollouts}
        if len(rollouts) != len(items) or fresh.keys() != {item.id for item in items}:
            raise FSTError(
                f"scoring candidate {candidate.id}: asked for examples {[item.id for item in items]}, "
                f"got rollouts of {[rollout.example_id for rollout in rollouts]}"
            )
        return fresh
