"""Watches one trial through its metrics: what it has reached at each point of the grid, and whether to give it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fst_optimizer.errors import StopRun
from fst_optimizer.lab.curves import Point, last_at
from fst_optimizer.tuning.grid import passed


class Listener(Protocol):
    """Who is told how a trial does."""

    def told(self, rollouts: int, score: float | None) -> None:
        """Training rollouts so far, and the last validation score."""
        ...

    def reached(self, step: int, score: float, scores: Mapping[str, float]) -> bool:
        """A point of the grid was passed with this validation score, and these by example. True: give the trial up."""
        ...


@dataclass
class Watcher:
    """A callback for `FST(callbacks=...)`."""

    points: Sequence[int]
    """The grid, in training rollouts."""
    listener: Listener
    curve: list[Point] = field(default_factory=list)
    """Evaluations so far."""
    pruned_at: int | None = None
    """The step, from 1, at which the trial was given up."""
    steps: int = 0
    """Points of the grid that were told."""
    _scores: list[Mapping[str, float]] = field(default_factory=list)
    _collecting: dict[str, float] = field(default_factory=dict)
    _by_candidate: dict[tuple[str, int], Mapping[str, float]] = field(default_factory=dict)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event.

        Raises:
            StopRun: the trial is given up.
        """
        if event["kind"] == "progress":
            if event["phase"] == "eval":
                self._collecting[event["example"]] = event["score"]
            return
        if event["kind"] not in ("fast", "step", "eval"):
            return
        rollouts = event["rollouts"]["fast"] + event["rollouts"]["slow"]
        self.listener.told(rollouts, self.curve[-1].score if self.curve else None)
        self._tell_points(passed(self.points, rollouts), may_stop=True)
        if event["kind"] == "eval":
            self._evaluated(event, rollouts)
            self.listener.told(rollouts, self.curve[-1].score)

    def ended(self) -> None:
        """The run went to its end: its last score stands at every point that is left."""
        self._tell_points(len(self.points), may_stop=False)

    def _evaluated(self, event: Mapping[str, Any], rollouts: int) -> None:
        pair = (event["candidate"], event["policy_version"])
        if self._collecting:  # else the pair was scored before, and keeps its score
            self._by_candidate = {name: scores for name, scores in self._by_candidate.items() if name[1] == pair[1]}
            self._by_candidate[pair] = self._collecting
            self._collecting = {}
        point = Point(rollouts, event["score"], event["kl_to_base"])
        if self.curve and self.curve[-1].rollouts == rollouts:
            if self.curve[-1].score >= point.score:
                return
            self.curve.pop()
            self._scores.pop()
        self.curve.append(point)
        self._scores.append(self._by_candidate.get(pair, {}))

    def _tell_points(self, count: int, *, may_stop: bool) -> None:
        while self.steps < count:
            found = last_at(self.curve, self.points[self.steps])
            self.steps += 1
            if found is None:
                continue
            scores = self._scores[self.curve.index(found)]
            if self.listener.reached(self.steps, found.score, scores) and may_stop:
                self.pruned_at = self.steps
                raise StopRun
