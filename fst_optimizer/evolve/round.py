"""One fast round: rescore the population at the current policy version, then a light GEPA search from there.

The search is GEPA's: its reflective proposer, Pareto parent selection, component and minibatch choice, and its rule of
acceptance. Ours are the start from a whole population, the budget, and who runs a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gepa.proposer.base import CandidateProposal

from fst_optimizer.config.run import FastConfig
from fst_optimizer.evolve.budget import RolloutBudget, Score
from fst_optimizer.evolve.gepa_adapter import GepaAdapter, GepaSearch, Wanted
from fst_optimizer.evolve.population import Scores, common_examples, frontier, select
from fst_optimizer.evolve.proposer import LONGEST, Proposer
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.types import Candidate, Item, Population, Rollout


@dataclass(frozen=True)
class Accepted:
    """A proposal that joined the search, and the candidate that it was made from; their means over the anchor."""

    candidate: Candidate
    parent: Candidate
    score: float
    parent_score: float


OnAccepted = Callable[[Accepted], None]

Outlook = Literal["open", "barren", "closed"]
"""What a round says of later ones under the same weights. `closed`: nothing can be proposed any more. `barren`: there
was nothing to try, as a candidate is right on the whole anchor or the reflector had no text that is new. `open`: all
else, also where every new text was rejected, or the reflection LM failed in passing."""
TOO_FEW = "the engine failed on more than half"


@dataclass(frozen=True)
class FastRound:
    """What a fast round found, and what it cost."""

    population: Population
    """Up to K candidates, all scored at this policy version on the whole anchor, best mean first."""
    frontier: tuple[str, ...]
    """Ids of the whole frontier, before the cut to K."""
    notes: tuple[str, ...]
    """What went wrong on the way, and last why the round ended."""
    lost: int = 0
    """Examples of the anchor that were left out for every candidate: the engine failed on them, and failed again."""
    outlook: Outlook = "open"
    tried: tuple[str, ...] = ()
    """Ids of the proposals whose texts were new to the search, accepted or not."""
    proposals: int = 0
    """Reflective mutations tried, those that came to nothing included."""
    accepted: int = 0
    """Proposals that beat their parent on the minibatch and joined the search."""
    rollouts: int = 0
    """Rollouts executed, those of rescoring included."""
    reused: int = 0
    """Of those, rollouts that served a second purpose."""
    reflection_calls: int = 0
    scores: Scores = field(default_factory=dict)
    """Of all that were scored on the whole anchor, those that are not kept included. Empty: nothing was rescored."""

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
    count_tokens: Callable[[str], int],
    rollouts_left: int | None = None,
    reflections_left: int | None = None,
    tried: Collection[str] = (),
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

    A rollout that the engine failed is run again once. If it is lost again, its example is left out for all candidates,
    so that means are over the same examples; with less than half of the anchor left, the round ends. `tried` has the
    ids of candidates that earlier rounds have tried: their texts are not new. `count_tokens` counts as the policy does,
    for `config.max_instruction_tokens`.

    With `config.parallel_proposals` above 1, so many start from what is known at that moment: their reflections are
    made side by side, their minibatches run as one batch, and those that are accepted are scored as one. Which they
    are, and their order, does not depend on who is answered first.
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
    scores = _rescored(candidates, items, budget)
    proposer = Proposer(reflector, candidates, components, cycle, reflections_left, notes, config, count_tokens, tried)
    search = Search(candidates, scores, budget, items, proposer, config, halted, on_accepted)
    common = common_examples(scores)
    if 2 * len(common) < len(items):
        notes.append(f"ended: {TOO_FEW} of the {len(items)} anchor examples; the population was not rescored")
        ids = tuple(candidate.id for candidate in population.candidates)
        return FastRound(population, ids, tuple(notes), len(items) - len(common), rollouts=budget.spent)
    search.leave_out({item.id for item in items} - common)
    why = search.run(turn=cycle, seed=f"{seed}/{cycle}")
    if search.lost:
        notes.append(f"{search.lost} of {len(items)} anchor examples were left out: the engine failed on them")
    if proposer.too_long:
        notes.append(f"{proposer.too_long} texts had more tokens than {LONGEST} ({config.max_instruction_tokens})")
    notes.append(f"ended: {why}")
    return FastRound(
        population=select(Population(tuple(candidates), policy_version, scores), config.population),
        frontier=frontier(scores),
        notes=tuple(notes),
        scores=scores,
        lost=search.lost,
        outlook=search.outlook,
        tried=tuple(proposer.new),
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


def _rescored(
    candidates: Sequence[Candidate], items: Sequence[Item], budget: RolloutBudget
) -> dict[str, dict[str, float]]:
    """Candidate id -> its scores; what is run again leaves enough for the candidates that follow."""
    waiting = len(candidates)
    scores = {}
    for candidate in candidates:
        waiting -= 1
        scores[candidate.id] = budget.scores(candidate, items, reserve=waiting * len(items))
    return scores


@dataclass
class Search:
    """GEPA's loop from a scored population: choose a parent, reflect, try on a minibatch, score what improved."""

    candidates: list[Candidate]
    """This and `scores` grow by every accepted proposal."""
    scores: dict[str, dict[str, float]]
    budget: RolloutBudget
    anchor: Sequence[Item]
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
    lost: int = 0
    """Examples of the anchor that are left out."""
    broken: bool = False
    """Whether the engine failed on too much for the search to go on."""

    def __post_init__(self) -> None:
        self.items = tuple(self.anchor)
        self._gepa: GepaSearch | None = None

    def run(self, *, turn: int, seed: str) -> str:
        """Propose until a limit is met; says which. `turn` is the component that round robin starts with."""
        proposer = self.proposer
        if not proposer.components:
            return "no component may change"
        minibatch = min(self.config.minibatch, len(self.items))
        # What must be left when a proposal's minibatch was run, to accept it: what is lost is not run again from that.
        reserve = len(self.anchor) + (-minibatch if self.budget.reuse else minibatch)
        count = 1

        def run(wanted: Wanted) -> list[list[Rollout]]:
            candidates = [(proposer.candidate(texts), batch) for texts, batch in wanted]
            return self.budget.run(candidates, capture=True, reserve=count * reserve)

        adapter = GepaAdapter(run)
        self._gepa = gepa = GepaSearch(
            self.candidates, self.scores, adapter, proposer, self.items, self.config, turn=turn, seed=seed
        )
        while (why := self._why_ended()) is None:
            count, proposer.asked = self._at_once(), 0
            proposals = gepa.propose(count)
            if proposer.failure is not None:
                raise proposer.failure
            self._take_in(proposals, gepa, count)
        return why

    def _at_once(self) -> int:
        """How many proposals start together: what is allowed in flight, and each of them could be accepted."""
        config, proposer = self.config, self.proposer
        most = min(config.parallel_proposals, config.max_proposals - self.proposals, self.budget.left // self._cost)
        if proposer.reflections_left is not None:
            most = min(most, proposer.reflections_left - proposer.reflections)
        return most

    @property
    def _cost(self) -> int:
        """What a proposal costs that is accepted. Greedy rollouts of parent and minibatch are there already."""
        minibatch = min(self.config.minibatch, len(self.items))
        return len(self.anchor) + (0 if self.budget.reuse else 2 * minibatch)

    @property
    def solved(self) -> bool:
        """Whether a candidate is right on the whole anchor."""
        return any(sum(scores.values()) / len(scores) >= PERFECT for scores in self.scores.values())

    @property
    def outlook(self) -> Outlook:
        """What this says of later rounds."""
        proposer = self.proposer
        if not proposer.components or not self.config.max_proposals or proposer.exhausted:
            return "closed"
        if self.broken or self.halted():
            return "open"
        return "barren" if self.solved or not (self.accepted or proposer.new or proposer.failed) else "open"

    def leave_out(self, examples: Collection[str]) -> None:
        """Compare without these examples from now on."""
        self.lost += len(examples)
        self.items = tuple(item for item in self.items if item.id not in examples)
        for row in self.scores.values():
            for example in examples:
                row.pop(example, None)
        if self._gepa:
            self._gepa.leave_out(examples)

    def _why_ended(self) -> str | None:
        config = self.config
        if self.broken:
            return f"{TOO_FEW} of what was asked"
        if self.solved:
            return "nothing fails on the anchor"
        if self.proposals >= config.max_proposals:
            return "max_proposals"
        if config.patience and self.fruitless >= config.patience:
            return "patience"
        if self.proposer.exhausted:
            return "no reflections left"
        if self.halted():
            return "a cap of the run is reached"
        if self.budget.left < self._cost:
            return "the rollout budget"
        epoch = math.ceil(len(self.items) / min(config.minibatch, len(self.items)))
        if self.skipped >= 4 * epoch * len(self.proposer.components):
            return "no minibatch showed a failure to reflect on"
        return None

    def _take_in(self, proposals: Sequence[CandidateProposal[Any]], gepa: GepaSearch, count: int) -> None:
        """Count `count` attempts, and score what improved. One that never asked the reflector was no proposal."""
        if not self.proposer.asked:
            self.skipped += count
            return
        self.skipped = 0
        self.proposals += self.proposer.asked
        self.broken = not all(map(gepa.conclusive, proposals))
        improved = [proposal for proposal in proposals if gepa.conclusive(proposal) and gepa.improves(proposal)]
        self.fruitless = 0 if improved else self.fruitless + self.proposer.asked
        candidates = [self.proposer.candidate(proposal.candidate) for proposal in improved]
        rows = self.budget.all_scores([(candidate, self.items) for candidate in candidates])
        for proposal, candidate, found in zip(improved, candidates, rows, strict=True):
            row = {item.id: found[item.id] for item in self.items if item.id in found}
            if 2 * len(row) < len(self.anchor):
                self.broken = True  # its means would be over too few examples to compare any candidate on
                continue
            self.leave_out({item.id for item in self.items} - row.keys())
            self.scores[candidate.id] = row
            self.candidates.append(candidate)
            self.accepted += 1
            gepa.add(candidate, proposal.parent_program_ids, row)
            self._tell(candidate)

    def _tell(self, candidate: Candidate) -> None:
        parent = next(known for known in self.candidates if known.id in candidate.parents)
        means = {name: sum(scores.values()) / len(scores) for name, scores in self.scores.items()}
        self.on_accepted(Accepted(candidate, parent, means[candidate.id], means[parent.id]))
