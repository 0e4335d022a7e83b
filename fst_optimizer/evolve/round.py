"""One fast round: rescore the population at the current policy version, then a light GEPA search from there.

The search is GEPA's: its reflective proposer, Pareto parent selection, component and minibatch choice, and its rule of
acceptance. Ours are the start from a whole population, the budget, and who runs a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fst_optimizer.config.run import FastConfig
from fst_optimizer.evolve.budget import RolloutBudget, Score
from fst_optimizer.evolve.population import Scores, common_examples, frontier, select
from fst_optimizer.evolve.proposer import LONGEST, Proposer
from fst_optimizer.evolve.reflect import Reflector
from fst_optimizer.evolve.search import TOO_FEW, OnAccepted, Outlook, Search
from fst_optimizer.types import Candidate, Item, Population


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
    """Reflective mutations and merges tried, those that came to nothing included."""
    accepted: int = 0
    """Proposals that were found better than their parent and joined the search."""
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
    root: Candidate,
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
    for `config.max_instruction_tokens`; `root` has the program's own instructions, for merges.

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
    search = Search(candidates, scores, budget, items, proposer, config, root, halted, on_accepted)
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
