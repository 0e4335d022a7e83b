"""One fast round: rescore the population at the current policy version, then a light GEPA search from there.

The search is GEPA's: its reflective proposer, Pareto parent selection, component and minibatch choice, and its rule of
acceptance. Ours are the start from a whole population, the budget, and who runs a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import FSTError
from fst_optimizer.evolve import gepa_parts as parts
from fst_optimizer.evolve.budget import RolloutBudget, Score
from fst_optimizer.evolve.gepa_adapter import GepaAdapter
from fst_optimizer.evolve.population import frontier, select
from fst_optimizer.evolve.proposer import Author, text_key
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.types import Candidate, Item, Population

__all__ = ["FastRound", "OnEvent", "Score", "evolve"]

OnEvent = Callable[..., None]
"""Called as `on_event(name, **fields)` with `rescored`, `proposal` or `accepted`."""


@dataclass(frozen=True)
class FastRound:
    """What a fast round found, and what it cost."""

    population: Population
    """Up to K candidates, all scored at this policy version on the whole anchor, best mean first."""
    proposals: int
    """Reflective mutations tried, those that came to nothing included."""
    accepted: int
    """Proposals that beat their parent on the minibatch and joined the search."""
    rollouts: int
    """Rollouts executed, those of rescoring included."""
    reused: int
    """Of those, rollouts that served a second purpose."""
    reflection_calls: int
    best_score: float
    """The best candidate's mean over the anchor."""
    frontier: tuple[str, ...]
    """Ids of the whole frontier, before the cut to K."""
    notes: tuple[str, ...]
    """What went wrong on the way, and last why the round ended."""


def evolve(
    population: Population,
    score: Score,
    anchor: Sequence[Item],
    reflector: Reflector,
    config: FastConfig,
    *,
    policy_version: int,
    cycle: int,
    seed: int,
    components: Sequence[str],
    rollouts_left: int | None = None,
    reflections_left: int | None = None,
    halted: Callable[[], bool] = lambda: False,
    on_event: OnEvent | None = None,
) -> FastRound:
    """Evolve a population under one policy version.

    Old scores are never used: GEPA's frontier would keep the best score ever seen and so favour candidates that an
    earlier policy liked. Every candidate is scored again first; those that no longer lead lose their place.

    Args:
        population: Where to start, from the last cycle or the seed alone.
        score: Runs rollouts.
        anchor: Examples that every candidate is scored on, and that minibatches are drawn from.
        reflector: Proposes texts. If it fails, that proposal is lost, not the run.
        config: Sizes and limits.
        policy_version: The version that `score` runs.
        cycle: Written into new candidates; also where round robin starts, so that short rounds reach every component.
        seed: Every random choice of the round follows from it.
        components: The components that may change.
        rollouts_left: What is left of the run's budget. None: no cap.
        reflections_left: Reflections that the run may still make. None: no cap.
        halted: Asked before each proposal whether a cap of the run is reached.
        on_event: Told of progress.

    Neither `config.max_rollouts` nor `rollouts_left` is ever passed: no proposal starts unless its acceptance could be
    paid too. When they are too small to rescore everybody, only the first candidates are scored and kept, and when too
    small for one candidate on the anchor, the anchor is cut. With nothing left, the population comes back as it was.
    """
    limit = config.max_rollouts if rollouts_left is None else min(config.max_rollouts, rollouts_left)
    items = tuple({item.id: item for item in anchor}.values())
    if limit <= 0 or not items:
        why = "no rollouts left" if items else "the anchor is empty"
        return _unchanged(population, f"ended: {why}; the population was not rescored")
    notes: list[str] = []
    if len(items) > limit:
        notes.append(f"anchor cut from {len(items)} to {limit} examples, all that the budget pays")
        items = items[:limit]
    ledger = RolloutBudget(score, limit, reuse=config.temperature == 0)
    tell = on_event or _silent
    rescored = _affordable(population, ledger.left // len(items), notes)
    scores = _rescore(rescored, ledger, items, tell)
    known = {text_key(candidate.texts): candidate for candidate in rescored}
    author = Author(reflector, known, components, cycle, reflections_left, notes)
    search = Search(rescored, scores, ledger, items, author, config, tell, halted)
    notes.append(f"ended: {search.run(turn=cycle, seed=f'{seed}/{cycle}')}")
    kept = select(Population(tuple(search.candidates), policy_version, search.scores), config.population)
    return FastRound(
        population=kept,
        proposals=search.proposals,
        accepted=search.accepted,
        rollouts=ledger.spent,
        reused=ledger.reused,
        reflection_calls=author.reflections,
        best_score=kept.mean_score(kept.best),
        frontier=frontier(search.scores),
        notes=tuple(notes),
    )


def _affordable(population: Population, most: int, notes: list[str]) -> list[Candidate]:
    """The distinct candidates, formerly best first, as many as can be rescored."""
    distinct = list({text_key(candidate.texts): candidate for candidate in population.candidates}.values())
    if len(distinct) > most:
        notes.append(f"rescored {most} of {len(distinct)} candidates, all that the budget pays")
    return sorted(distinct, key=population.mean_score, reverse=True)[:most]


def _rescore(
    candidates: Sequence[Candidate], ledger: RolloutBudget, items: Sequence[Item], tell: OnEvent
) -> dict[str, dict[str, float]]:
    scores = {}
    for candidate in candidates:
        scores[candidate.id] = _score_row(ledger, candidate, items)
        tell("rescored", candidate=candidate.id, score=_mean(scores[candidate.id]), rollouts=ledger.spent)
    return scores


class Search:
    """GEPA's loop from a scored population: choose a parent, reflect, try on a minibatch, score what improved."""

    def __init__(
        self,
        candidates: list[Candidate],
        scores: dict[str, dict[str, float]],
        ledger: RolloutBudget,
        items: Sequence[Item],
        author: Author,
        config: FastConfig,
        tell: OnEvent,
        halted: Callable[[], bool],
    ) -> None:
        """`candidates` and `scores` grow by every accepted proposal."""
        self.candidates = candidates
        self.scores = scores
        self.proposals = 0
        self.accepted = 0
        self._ledger = ledger
        self._items = items
        self._author = author
        self._config = config
        self._tell = tell
        self._halted = halted
        self._minibatch = min(config.minibatch, len(items))
        self._fruitless = 0
        self._skipped = 0

    def run(self, *, turn: int, seed: str) -> str:
        """Propose until a limit is met; says which. `turn` is the component that round robin starts with."""
        if not self._author.components:
            return "no component may change"
        bridge = GepaAdapter(lambda texts, batch: self._ledger.run(self._author.candidate(texts), batch, capture=True))
        state = parts.state_of(self.candidates, self.scores, self._author.components, turn)
        proposer = parts.proposer(bridge, self._author, self._items, self._minibatch, self._config.components, seed)
        while (why := self._why_ended()) is None:
            parts.next_iteration(state)
            self._author.asked = False
            found = proposer.propose(state)
            if self._author.failure is not None:
                raise self._author.failure
            if bridge.failure is not None:
                raise FSTError("building the examples to reflect on failed") from bridge.failure
            self._judge(found, state)
        return why

    def _why_ended(self) -> str | None:
        config, epoch = self._config, -(-len(self._items) // self._minibatch)
        if max(_mean(row) for row in self.scores.values()) >= PERFECT:
            return "nothing fails on the anchor"
        if self.proposals >= config.max_proposals:
            return "max_proposals"
        if config.patience and self._fruitless >= config.patience:
            return "patience"
        if self._author.exhausted:
            return "no reflections left"
        if self._halted():
            return "a cap of the run is reached"
        if self._ledger.left < self._dearest_attempt():
            return "the rollout budget"
        if self._skipped >= 4 * epoch * len(self._author.components):
            return "no minibatch showed a failure to reflect on"
        return None

    def _dearest_attempt(self) -> int:
        """Rollouts of a proposal that is accepted. Greedy ones of the parent and the minibatch are there already."""
        return len(self._items) + (0 if self._ledger.reuse else 2 * self._minibatch)

    def _judge(self, found: Sequence[Any], state: Any) -> None:
        """Count the attempt and take in what improved. One that never reached the reflector was no proposal."""
        if not self._author.asked:
            self._skipped += 1
            return
        self._skipped = 0
        self.proposals += 1
        improved = [self._improves(proposal, state) for proposal in found]
        if not found:
            self._tell("proposal", number=self.proposals, candidate=None, accepted=False)
        for proposal in compress(found, improved):
            self._accept(proposal, state)
        self._fruitless = 0 if any(improved) else self._fruitless + 1

    def _improves(self, proposal: Any, state: Any) -> bool:
        improved = parts.improves(proposal, state)
        self._tell(
            "proposal",
            number=self.proposals,
            candidate=self._author.candidate(proposal.candidate).id,
            before=sum(proposal.subsample_scores_before),
            after=sum(proposal.subsample_scores_after),
            accepted=improved,
        )
        return improved

    def _accept(self, proposal: Any, state: Any) -> None:
        candidate = self._author.candidate(proposal.candidate)
        row = _score_row(self._ledger, candidate, self._items)
        self.candidates.append(candidate)
        self.scores[candidate.id] = row
        self.accepted += 1
        parts.add_to(state, candidate, proposal.parent_program_ids, row)
        self._tell("accepted", candidate=candidate.id, parents=candidate.parents, score=_mean(row))


def _score_row(ledger: RolloutBudget, candidate: Candidate, items: Sequence[Item]) -> dict[str, float]:
    return {rollout.example_id: rollout.score for rollout in ledger.run(candidate, items, capture=False)}


def _unchanged(population: Population, note: str) -> FastRound:
    best = population.mean_score(population.best)
    return FastRound(population, 0, 0, 0, 0, 0, best, tuple(c.id for c in population.candidates), (note,))


def _mean(row: Mapping[str, float]) -> float:
    return sum(row.values()) / len(row)


def _silent(name: str, **fields: Any) -> None:
    """No one listens."""
