"""GEPA's loop over a scored population: choose parents, reflect, try on minibatches, score what improved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gepa.proposer.base import CandidateProposal

from fst_optimizer.config.run import FastConfig
from fst_optimizer.evolve.budget import RolloutBudget
from fst_optimizer.evolve.gepa_adapter import GepaAdapter, GepaSearch, Wanted
from fst_optimizer.evolve.merge import next_merge, telling_examples
from fst_optimizer.evolve.population import frontier
from fst_optimizer.evolve.proposer import Proposer
from fst_optimizer.evolve.reflect import PERFECT
from fst_optimizer.evolve.trial import Trial
from fst_optimizer.types import Candidate, Item, Rollout


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
    root: Candidate
    """The program's own instructions, from which all candidates come."""
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
        # A merge is due once the population is scored, and after everything that is accepted.
        self._merge_due = self.config.merge

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
            if self._merge_due and self._try_merge(f"merge/{seed}"):
                continue
            count, proposer.asked = self._at_once(), 0
            proposals = gepa.propose(count)
            if proposer.failure is not None:
                raise proposer.failure
            # An attempt that never asked the reflector was no proposal.
            self.skipped = 0 if proposer.asked else self.skipped + count
            if proposer.asked:
                self._take_in(list(map(self._trial, proposals)), proposer.asked, seed)
        return why

    def _trial(self, proposal: CandidateProposal[Any]) -> Trial:
        """A proposal of GEPA's with its scores on its minibatch, and its parent's."""
        before, after = proposal.eval_before, proposal.eval_after
        assert before is not None and after is not None
        (parent,) = proposal.parent_program_ids
        return Trial(
            candidate=self.proposer.candidate(proposal.candidate),
            parents=[parent],
            before=self.scores[self.candidates[parent].id],
            minibatch=[rollout.example_id for rollout in before.outputs],
            seen=list(zip(before.scores, after.scores, strict=True)),
        )

    def _try_merge(self, seed: str) -> bool:
        """Merge two candidates of the frontier and try the result as a proposal. False: none is left to merge."""
        self._merge_due = False
        proposer, scores = self.proposer, self.scores
        # With the predictors' own scores: two that score alike, each by another predictor, are both on the frontier.
        wide = {name: {**row, **self.budget.part_scores(name, row)} for name, row in scores.items()}
        child = next_merge(frontier(wide), wide, proposer.known, self.root, proposer.cycle)
        if child is None:
            return False
        proposer.take_in(child)
        one, other = (scores[name] for name in child.parents)
        chosen = telling_examples(one, other, min(self.config.minibatch, len(self.items)), f"{seed}/{child.id}")
        items = {item.id: item for item in self.items}
        (ran,) = self.budget.run([(child, [items[name] for name in chosen])], capture=False, reserve=len(self.anchor))
        better = max((one, other), key=lambda row: sum(row[name] for name in chosen))
        seen = [(better[run.example_id], math.nan if run.lost else run.score) for run in ran]
        places = {candidate.id: place for place, candidate in enumerate(self.candidates)}
        trial = Trial(child, [places[name] for name in child.parents], better, chosen, seen, ties=True)
        accepted = self.accepted
        self._take_in([trial], 1, seed)
        outcome = "accepted" if self.accepted > accepted else "rejected"
        got = f"{sum(after for _, after in seen):g} against {sum(before for before, _ in seen):g}"
        merged = f"{child.id}, merged from {' and '.join(child.parents)}"
        proposer.notes.append(f"candidate {merged}, was {outcome}: {got} on {len(chosen)} examples")
        return True

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
        drawn = len(self.anchor) if self.config.accept == "paired" else 0
        return len(self.anchor) + (0 if self.budget.reuse else 2 * minibatch + drawn)

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

    def _take_in(self, trials: Sequence[Trial], tried: int, seed: str) -> None:
        """Count so many proposals, decide on those that came to a trial, and score what improved."""
        self.proposals += tried
        paired = self.config.accept == "paired"
        if paired:
            self._draw([trial for trial in trials if trial.conclusive], seed)
        self.broken = not all(trial.conclusive for trial in trials)
        improved = [
            trial for trial in trials if trial.conclusive and (trial.passes_paired if paired else trial.sum_is_better)
        ]
        self.fruitless = 0 if improved else self.fruitless + tried
        self._add(improved)

    def _draw(self, trials: Sequence[Trial], seed: str) -> None:
        """Draw examples of the anchor, a minibatch at a time, until the paired test has decided or none is left."""
        rest = {}
        for trial in trials:
            order = [item for item in self.items if item.id not in trial.minibatch]
            random.Random(f"paired/{seed}/{trial.candidate.id}").shuffle(order)
            rest[trial.candidate.id] = order
        size, reserve = self.config.minibatch, len(trials) * len(self.anchor)
        while waiting := [one for one in trials if one.verdict == "open" and rest[one.candidate.id]]:
            wanted = [(one.candidate, rest[one.candidate.id][:size]) for one in waiting]
            for one, ran in zip(waiting, self.budget.run(wanted, capture=False, reserve=reserve), strict=True):
                rest[one.candidate.id] = rest[one.candidate.id][size:]
                one.fresh += [(one.before[run.example_id], math.nan if run.lost else run.score) for run in ran]
        for trial in trials:
            self.proposer.notes.append(f"candidate {trial.candidate.id}: {trial.told()}")

    def _add(self, improved: Sequence[Trial]) -> None:
        """Score on the anchor what is taken, as one batch, and let it join."""
        assert self._gepa is not None
        rows = self.budget.all_scores([(trial.candidate, self.items) for trial in improved])
        for trial, found in zip(improved, rows, strict=True):
            row = {item.id: found[item.id] for item in self.items if item.id in found}
            if 2 * len(row) < len(self.anchor):
                self.broken = True  # its means would be over too few examples to compare any candidate on
                continue
            self.leave_out({item.id for item in self.items} - row.keys())
            self.scores[trial.candidate.id] = row
            self.candidates.append(trial.candidate)
            self.accepted += 1
            self._merge_due = self.config.merge
            self._gepa.add(trial.candidate, trial.parents, row)
            self._tell(trial.candidate)

    def _tell(self, candidate: Candidate) -> None:
        parent = next(known for known in self.candidates if known.id in candidate.parents)
        means = {name: sum(scores.values()) / len(scores) for name, scores in self.scores.items()}
        self.on_accepted(Accepted(candidate, parent, means[candidate.id], means[parent.id]))
