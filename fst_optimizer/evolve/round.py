"""One fast round: rescore the population at the current policy version, then a light GEPA search from there.

The search is GEPA's: its reflective proposer, Pareto parent selection, component and minibatch choice, and its rule of
acceptance. Ours are the start from a whole population, the budget, and who runs a rollout.
"""

from __future__ import annotations

import math
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
class Accepted:
    """A proposal that joined the search, and the candidate that it was made from; their means over the anchor."""

    candidate: Candidate
    parent: Candidate
    score: float
    parent_score: float


OnAccepted = Callable[[Accepted], None]


@dataclass(frozen=True)
class FastRound:
    """What a fast round found, and what it cost."""

    population: Population
    """Up to K candidates, all scored at this policy version on the whole anchor, best mean first."""
    frontier: tuple[str, ...]
    """Ids of the whole frontier, before the cut to K."""
    notes: tuple[str, ...]
    """What went wrong on the way, and last why the round ended."""
    proposals: int = 0
    """Reflective mutations tried, those that came to nothing included."""
    accepted: int = 0
    """Proposals that beat their parent on the minibatch and joined the search."""
    rollouts: int = 0
    """Rollouts executed, those of rescoring included."""
    reused: int = 0
    """Of those, rollouts that served a second purpose."""
    reflection_calls: int = 0

    @property
    def best_score(self) -> float:
        """The best candidate's mean over the anchor."""
        return self.population.mean_score(self.population.best)


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
    on_accepted: OnAccepted = lambda accepted: None,
) -> FastRound:
    """Evolve a population under one policy version, which `score` runs.

    Old scores are never used: GEPA's frontier would keep the best score ever seen and so favour candidates that an
    earlier policy liked. Every candidate is scored again first; those that no longer lead lose their place.

    Minibatches are drawn from the anchor. Only `components` may change; round robin starts at the cycle's number, so
    that short rounds reach every one. If the reflector fails, that proposal is lost, not the run. `rollouts_left` and
    `reflections_left` are what is left of the run's budget (None: no cap), and `halted` is asked before each proposal
    whether a cap of the run is reached. `on_accepted` is told of every proposal that joins.

    Neither `config.max_rollouts` nor `rollouts_left` is ever passed: no proposal starts unless enough is left to accept
    it. When they are too small to rescore everybody, only the formerly best candidates are scored and kept, and when
    too small for one candidate on the anchor, the anchor is cut. With nothing left, the population stays as it is.
    """
    limit = config.max_rollouts if rollouts_left is None else min(config.max_rollouts, rollouts_left)
    items = tuple({item.id: item for item in anchor}.values())
    if limit <= 0 or not items:
        why = "no rollouts left" if items else "the anchor is empty"
        ids = tuple(candidate.id for candidate in population.candidates)
        return FastRound(population, ids, (f"ended: {why}; the population was not rescored",))
    notes: list[str] = []
    if len(items) > limit:
        notes.append(f"anchor cut from {len(items)} to {limit} examples, all that the budget pays")
        items = items[:limit]
    budget = RolloutBudget(score, limit, reuse=config.temperature == 0)
    candidates = _affordable(population, limit // len(items), notes)
    scores = {candidate.id: budget.scores(candidate, items) for candidate in candidates}
    proposer = Proposer(reflector, candidates, components, cycle, reflections_left, notes)
    search = Search(candidates, scores, budget, items, proposer, config, halted, on_accepted)
    notes.append(f"ended: {search.run(turn=cycle, seed=f'{seed}/{cycle}')}")
    return FastRound(
        population=select(Population(tuple(candidates), policy_version, scores), config.population),
        frontier=frontier(scores),
        notes=tuple(notes),
        proposals=search.proposals,
        accepted=search.accepted,
        rollouts=budget.spent,
        reused=budget.reused,
        reflection_calls=proposer.reflections,
    )


def _affordable(population: Population, most: int, notes: list[str]) -> list[Candidate]:
    """The distinct candidates, formerly best first, as many as can be rescored."""
    distinct = list({candidate.id: candidate for candidate in population.candidates}.values())
    if len(distinct) > most:
        notes.append(f"rescored {most} of {len(distinct)} candidates, all that the budget pays")
    return sorted(distinct, key=population.mean_score, reverse=True)[:most]


@dataclass
class Search:
    """GEPA's loop from a scored population: choose a parent, reflect, try on a minibatch, score what improved."""

    candidates: list[Candidate]
    """This and `scores` grow by every accepted proposal."""
    scores: dict[str, dict[str, float]]
    budget: RolloutBudget
    items: Sequence[Item]
    proposer: Proposer
    config: FastConfig
    halted: Callable[[], bool]
    on_accepted: OnAccepted
    proposals: int = 0
    accepted: int = 0
    fruitless: int = 0
    """Proposals since the last one that was accepted."""
    skipped: int = 0
    """Attempts since the last one that showed the reflector a failure."""

    def run(self, *, turn: int, seed: str) -> str:
        """Propose until a limit is met; says which. `turn` is the component that round robin starts with."""
        proposer = self.proposer
        if not proposer.components:
            return "no component may change"
        adapter = GepaAdapter(lambda texts, batch: self.budget.run(proposer.candidate(texts), batch, capture=True))
        gepa = GepaSearch(
            self.candidates, self.scores, adapter, proposer, self.items, self.config, turn=turn, seed=seed
        )
        while (why := self._why_ended()) is None:
            proposer.asked = False
            proposals = gepa.propose()
            if proposer.failure is not None:
                raise proposer.failure
            self._take_in(proposals, gepa)
        return why

    def _why_ended(self) -> str | None:
        config = self.config
        if any(sum(scores.values()) / len(scores) >= PERFECT for scores in self.scores.values()):
            return "nothing fails on the anchor"
        if self.proposals >= config.max_proposals:
            return "max_proposals"
        if config.patience and self.fruitless >= config.patience:
            return "patience"
        if self.proposer.exhausted:
            return "no reflections left"
        if self.halted():
            return "a cap of the run is reached"
        minibatch = min(config.minibatch, len(self.items))
        # What a proposal costs that is accepted. Greedy rollouts of parent and minibatch are there already.
        if self.budget.left < len(self.items) + (0 if self.budget.reuse else 2 * minibatch):
            return "the rollout budget"
        epoch = math.ceil(len(self.items) / minibatch)
        if self.skipped >= 4 * epoch * len(self.proposer.components):
            return "no minibatch showed a failure to reflect on"
        return None

    def _take_in(self, proposals: Sequence[CandidateProposal[Any]], gepa: GepaSearch) -> None:
        """Count the attempt, and score what improved. An attempt that never asked the reflector was no proposal."""
        if not self.proposer.asked:
            self.skipped += 1
            return
        self.skipped = 0
        self.proposals += 1
        improved = [proposal for proposal in proposals if gepa.improves(proposal)]
        self.fruitless = 0 if improved else self.fruitless + 1
        for proposal in improved:
            candidate = self.proposer.candidate(proposal.candidate)
            self.scores[candidate.id] = self.budget.scores(candidate, self.items)
            self.candidates.append(candidate)
            self.accepted += 1
            gepa.add(candidate, proposal.parent_program_ids, self.scores[candidate.id])
            self._tell(candidate)

    def _tell(self, candidate: Candidate) -> None:
        parent = next(known for known in self.candidates if known.id in candidate.parents)
        means = {name: sum(scores.values()) / len(scores) for name, scores in self.scores.items()}
        self.on_accepted(Accepted(candidate, parent, means[candidate.id], means[parent.id]))
