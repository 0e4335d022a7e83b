"""Reports a run of FST to its Optuna trial, on the grid of rollouts, and ends it where the pruner says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fst_optimizer.errors import StopRun
from fst_optimizer.tuning.pruning import SCORES, passed

if TYPE_CHECKING:
    from optuna.trial import Trial

Scores = Mapping[str, float]
"""Example -> score."""


class Evaluation(NamedTuple):
    """One evaluation on the validation set."""

    rollouts: int
    """Training rollouts before it."""
    score: float
    by_example: Scores


@dataclass
class PruningCallback:
    """A callback for `FST(callbacks=...)`; raises StopRun where the trial is pruned."""

    trial: Trial
    points: Sequence[int]
    """The grid, in training rollouts. Step n of the trial is the n-th point, from 1."""
    prunes: bool = True
    """Whether scores are reported and the pruner is asked: Optuna does neither with several objectives."""
    keeps_examples: bool = False
    """Whether the trial keeps scores by example at each point, for a pruner that compares them."""
    pruned_at: int | None = None
    """The step at which the trial was pruned."""
    steps: int = 0
    """Points of the grid that are behind."""
    _evaluations: list[Evaluation] = field(default_factory=list)
    _collecting: dict[str, float] = field(default_factory=dict)
    _by_pair: dict[tuple[str, int], Scores] = field(default_factory=dict)
    _reported: dict[str, Scores] = field(default_factory=dict)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event."""
        if event["kind"] == "progress" and event["phase"] == "eval":
            self._collecting[event["example"]] = event["score"]
        if event["kind"] not in ("fast", "step", "eval"):
            return
        rollouts = event["rollouts"]["fast"] + event["rollouts"]["slow"]
        self.trial.set_user_attr("rollouts", rollouts)
        self._report(passed(self.points, rollouts), may_prune=True)
        if event["kind"] == "eval":
            self._evaluated(event, rollouts)
            self.trial.set_user_attr("score", self._evaluations[-1].score)

    def ended(self) -> None:
        """The run went to its end: its last score stands at every point that is left."""
        self._report(len(self.points), may_prune=False)

    def _evaluated(self, event: Mapping[str, Any], rollouts: int) -> None:
        pair = (event["candidate"], event["policy_version"])
        if self._collecting:  # else the pair was scored before, and keeps its scores
            self._by_pair = {known: scores for known, scores in self._by_pair.items() if known[1] == pair[1]}
            self._by_pair[pair] = self._collecting
            self._collecting = {}
        found = Evaluation(rollouts, event["score"], self._by_pair.get(pair, {}))
        if self._evaluations and self._evaluations[-1].rollouts == rollouts:  # the better of two candidates counts
            found = max(self._evaluations.pop(), found, key=lambda one: one.score)
        self._evaluations.append(found)

    def _report(self, count: int, *, may_prune: bool) -> None:
        while self.steps < count:
            self.steps += 1
            point = self.points[self.steps - 1]
            found = next((one for one in reversed(self._evaluations) if one.rollouts <= point), None)
            if found is None or not self.prunes:
                continue
            if self.keeps_examples:
                self._reported[str(self.steps)] = found.by_example
                self.trial.set_user_attr(SCORES, self._reported)
            self.trial.report(found.score, self.steps)
            # Asked even at the end: successive halving notes the scores of complete trials when it is.
            if self.trial.should_prune() and may_prune:
                self.pruned_at = self.steps
                raise StopRun
