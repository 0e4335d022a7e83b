"""One fast round: rescore the population at the current policy version, then a light GEPA search from there.

The search is GEPA's: its reflective proposer, Pareto parent selection, component and minibatch choice, and its rule of
acceptance. Ours are the start from a whole population, the budget, and who runs a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gepa.proposer.base import CandidateProposal

from fst_optimizer.config.run import FastConfig
from fst_optimizer.evolve.budget import RolloutBudget, Score
from fst_optimizer.evolve.gepa_adapter import GepaAdapter, GepaSearch
from fst_optimizer.evolve.population import frontier, select
from fst_optimizer.evolve.proposer import Proposer
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.types import Candidate, Item, Population


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

    Neither `config.max_rollouts` nor `rollouts_left` is ever passed: no proposal starts unless enough is left to accept
    it. When they are too small to rescore everybody, only the formerly best candidates are scored and kept, and when
    too small for one candidate on the anchor, the anchor is cut. With nothing left, the population stays as it is.
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
    budget = RolloutBudget(score, limit, reuse=config.temperature == 0)
    candidates = _affordable(population, budget.left // len(items), notes)
    scores = {candidate.id: budget.scores(candidate, items) for candidate in candidates}
    proposer = Proposer(reflector, candidates, components, cycle, reflections_left, notes)
    search = Search(candidates, scores, budget, items, proposer, config, halted)
    notes.append(f"ended: {search.run(turn=cycle, seed=f'{seed}/{cycle}')}")
    return search.found(policy_version, notes)


def _affordable(population: Population, most: int, notes: list[str]) -> list[Candidate]:
    """The distinct candidates, formerly best first, as many as can be rescored."""
    distinct = list({candidate.id: candidate for candidate in population.candidates}.values())
    if len(distinct) > most:
        notes.append(f"rescored {most} of {len(distinct)} candidates, all that the budget pays")
    return sorted(distinct, key=population.mean_score, reverse=True)[:most]


def _unchanged(population: Population, note: str) -> FastRound:
    best = population.mean_score(population.best)
    return FastRound(population, 0, 0, 0, 0, 0, best, tuple(c.id for c in population.candidates), (note,))


class Search:
    """GEPA's loop from a scored population: choose a parent, reflect, try on a minibatch, score what improved."""

    def __init__(
        self,
        candidates: list[Candidate],
        scores: dict[str, dict[str, float]],
        budget: RolloutBudget,
        items: Sequence[Item],
        proposer: Proposer,
        config: FastConfig,
        halted: Callable[[], bool],
    ) -> None:
        """`candidates` and `scores` grow by every accepted proposal."""
        self.candidates = candidates
        self.scores = scores
        self.proposals = 0
        self.accepted = 0
        self._budget = budget
        self._items = items
        self._proposer = proposer
        self._config = config
        self._halted = halted
        self._minibatch = min(config.minibatch, len(items))
        self._fruitless = 0
        """Proposals since the last one that was accepted."""
        self._skipped = 0
        """Attempts since the last one that showed the reflector a failure."""

    def run(self, *, turn: int, seed: str) -> str:
        """Propose until a limit is met; says which. `turn` is the component that round robin starts with."""
        proposer = self._proposer
        if not proposer.components:
            return "no component may change"
        gepa = GepaSearch(
            self.candidates,
            self.scores,
            GepaAdapter(lambda texts, batch: self._budget.run(proposer.candidate(texts), batch, capture=True)),
            proposer,
            items=self._items,
            minibatch=self._minibatch,
            components=proposer.components,
            which=self._config.components,
            turn=turn,
            seed=seed,
        )
        while (why := self._why_ended()) is None:
            proposer.asked = False
            proposals = gepa.propose()
            if proposer.failure is not None:
                raise proposer.failure
            self._take_in(proposals, gepa)
        return why

    def found(self, policy_version: int, notes: Sequence[str]) -> FastRound:
        """The round: the best of the candidates, and what finding them took."""
        scored = Population(tuple(self.candidates), policy_version, self.scores)
        kept = select(scored, self._config.population)
        return FastRound(
            population=kept,
            proposals=self.proposals,
            accepted=self.accepted,
            rollouts=self._budget.spent,
            reused=self._budget.reused,
            reflection_calls=self._proposer.reflections,
            best_score=kept.mean_score(kept.best),
            frontier=frontier(self.scores),
            notes=tuple(notes),
        )

    def _why_ended(self) -> str | None:
        config, epoch = self._config, -(-len(self._items) // self._minibatch)
        if any(sum(scores.values()) / len(scores) >= PERFECT for scores in self.scores.values()):
            return "nothing fails on the anchor"
        if self.proposals >= config.max_proposals:
            return "max_proposals"
        if config.patience and self._fruitless >= config.patience:
            return "patience"
        if self._proposer.exhausted:
            return "no reflections left"
        if self._halted():
            return "a cap of the run is reached"
        if self._budget.left < self._cost_if_accepted():
            return "the rollout budget"
        if self._skipped >= 4 * epoch * len(self._proposer.components):
            return "no minibatch showed a failure to reflect on"
        return None

    def _cost_if_accepted(self) -> int:
        """Rollouts of a proposal that is accepted. Greedy ones of the parent and the minibatch are there already."""
        return len(self._items) + (0 if self._budget.reuse else 2 * self._minibatch)

    def _take_in(self, proposals: Sequence[CandidateProposal[Any]], gepa: GepaSearch) -> None:
        """Count the attempt, and score what improved. An attempt that never asked the reflector was no proposal."""
        if not self._proposer.asked:
            self._skipped += 1
            return
        self._skipped = 0
        self.proposals += 1
        improved = [proposal for proposal in proposals if gepa.improves(proposal)]
        self._fruitless = 0 if improved else self._fruitless + 1
        for proposal in improved:
            candidate = self._proposer.candidate(proposal.candidate)
            scores = self._budget.scores(candidate, self._items)
            self.candidates.append(candidate)
            self.scores[candidate.id] = scores
            self.accepted += 1
            gepa.add(candidate, proposal.parent_program_ids, scores)
