"""The rollouts of a fast round: checked against its limit, and run once where a second run would repeat the first.

A rollout that the engine failed is run once more. If that is lost too, it stays lost: it is no score of 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from fst_optimizer.errors import FSTError
from fst_optimizer.types import Candidate, Item, Rollout

Wanted = Sequence[tuple[Candidate, Sequence[Item]]]
"""Candidates, each with the items to run it on."""


class Score(Protocol):
    """Runs candidates at the current policy version, all of them as one batch."""

    def __call__(self, wanted: Wanted, *, capture: bool) -> Sequence[Rollout]:
        """One rollout per candidate and item; with `capture`, trace and feedback are filled in."""
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
        return self.all_scores([(candidate, items)], reserve=reserve)[0]

    def all_scores(self, wanted: Wanted, *, reserve: int = 0) -> list[dict[str, float]]:
        """`scores` of several candidates, run as one batch."""
        found = self.run(wanted, capture=False, reserve=reserve)
        return [{one.example_id: one.score for one in rollouts if not one.lost} for rollouts in found]

    def part_scores(self, candidate: str, examples: Collection[str]) -> dict[str, float]:
        """`EXAMPLE PREDICTOR` -> the predictor's own score; of what is kept, so of greedy rollouts alone."""
        return {
            f"{example} {predictor}": score
            for example in examples
            if (rollout := self._kept.get((candidate, example))) is not None and not rollout.lost
            for predictor, score in rollout.predictor_scores.items()
        }

    def run(self, wanted: Wanted, *, capture: bool, reserve: int = 0) -> list[list[Rollout]]:
        """One rollout per candidate and item, in order; what comes twice in one call is run once.

        What is lost is run again, as far as `reserve` rollouts are left afterwards.
        """
        keys = {(candidate.id, item.id): (candidate, item) for candidate, items in wanted for item in items}
        found = {key: self._kept[key] for key in keys if key in self._kept}
        self._reused.update(found)
        missing = [pair for key, pair in keys.items() if key not in found]
        if missing:
            assert len(missing) <= self.left, "callers check the budget before they spend it"
            fresh = self._execute(missing, capture or self.reuse)
            lost = [(candidate, item) for candidate, item in missing if fresh[candidate.id, item.id].lost]
            if again := lost[: max(0, self.left - reserve)]:
                fresh |= self._execute(again, capture or self.reuse)
            found |= fresh
            if self.reuse:
                self._kept.update(fresh)
        return [[found[candidate.id, item.id] for item in items] for candidate, items in wanted]

    def _execute(self, pairs: Sequence[tuple[Candidate, Item]], capture: bool) -> dict[tuple[str, str], Rollout]:
        self.spent += len(pairs)
        candidates = {candidate.id: candidate for candidate, _ in pairs}
        wanted = [
            (candidate, [item for other, item in pairs if other.id == name]) for name, candidate in candidates.items()
        ]
        rollouts = self._score(wanted, capture=capture)
        fresh = {(rollout.candidate_id, rollout.example_id): rollout for rollout in rollouts}
        if len(rollouts) != len(pairs) or fresh.keys() != {(candidate.id, item.id) for candidate, item in pairs}:
            raise FSTError(
                f"scoring candidates {list(candidates)}: asked for examples {[item.id for _, item in pairs]}, "
                f"got rollouts of {[rollout.example_id for rollout in rollouts]}"
            )
        return fresh
