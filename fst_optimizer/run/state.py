"""What a run knows between two phases of a cycle.

A phase takes a `State` and returns the next; `checkpoint` writes it down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from fst_optimizer.data import Success
from fst_optimizer.run.allocation import Ledger
from fst_optimizer.run.monitors import Alarm, Watch
from fst_optimizer.run.switches import Lookout
from fst_optimizer.store.tally import Tally
from fst_optimizer.types import Candidate, Population, Rollout, RolloutCounts, Stored, Usage

Score = Annotated[
    float,
    PlainSerializer(lambda score: score if math.isfinite(score) else None),
    BeforeValidator(lambda score: -math.inf if score is None else score),
]
"""-inf is null in `state.json`: JSON has no infinities."""


Rollouts = Annotated[
    tuple[Rollout, ...],
    PlainSerializer(lambda rollouts: [one.to_json() for one in rollouts]),
    BeforeValidator(lambda rollouts: tuple(map(Rollout.from_json, rollouts))),
]


@dataclass(frozen=True)
class Best(Stored):
    """The best (candidate, policy version) pair on the validation set so far."""

    candidate: Candidate
    policy_version: int
    score: Score = -math.inf
    """Before anything is validated, any score is better."""
    kl_to_base: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    """Example id -> score, of the examples that were answered. Empty in what an earlier version wrote."""
    tokens_per_answer: float = 0.0
    """Mean tokens that the policy read and wrote for one of them. 0 in what an earlier version wrote."""

    @classmethod
    def of(cls, candidate: Candidate, found: ValidationScore) -> Best:
        """The pair of a candidate and the version that it was validated at."""
        names = ("policy_version", "score", "kl_to_base", "scores", "tokens_per_answer")
        return cls(candidate, **{name: getattr(found, name) for name in names})

    def beaten_by(self, found: ValidationScore) -> bool:
        """Whether another pair did better on the examples that both answered.

        Where the engine failed on some, means over different examples say little. With less than half of this pair's
        examples in common, nothing is said.
        """
        if not self.scores or self.scores.keys() == found.scores.keys():
            return found.score > self.score
        common = self.scores.keys() & found.scores.keys()
        if 2 * len(common) < len(self.scores):
            return False
        return math.fsum(found.scores[name] for name in common) > math.fsum(self.scores[name] for name in common)


@dataclass(frozen=True)
class ValidationScore:
    """What a candidate reached on the validation set at one policy version."""

    policy_version: int
    score: float
    kl_to_base: float
    failed: int
    """Rollouts whose outcome was not `ok`."""
    rollouts: int
    """Rollouts that it took."""
    tally: Tally = field(default_factory=Tally)
    """How they ended on each example."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Example id -> score, of those that were answered: what `score` is the mean of."""
    lost: int = 0
    """Examples that were not answered: the engine failed on them twice."""
    tokens_per_answer: float = 0.0
    """Mean tokens that the policy read and wrote for one of them. 0 in what an earlier version wrote."""


@dataclass(frozen=True)
class StageEnd(Stored):
    """The pair that a stage of a stream ended with."""

    candidate: Candidate
    policy_version: int
    kl_to_base: float
    rollouts: int
    """Fast and slow ones until then, since the run's start."""
    scores: tuple[float, ...]
    """On the validation set of every stage, in order."""


@dataclass(frozen=True)
class Stream(Stored):
    """What a run over several stages knows besides."""

    stages: int
    """How many there are."""
    stage: int = 0
    """Whose examples come now, from 0. Nothing but the data, and what is written down, may depend on it."""
    before: tuple[float, ...] = ()
    """The seed candidate's score on the validation set of every stage, at the start version."""
    ends: tuple[StageEnd, ...] = ()
    lookout: Lookout = field(default_factory=Lookout)
    switches: tuple[int, ...] = ()
    """Fast and slow rollouts when a switch was noticed."""
    searched: int = 0
    """Fast rollouts before the last switch that was noticed: a method that searches first does so again then."""
    retry: bool = False
    """Whether the next fast round tries the seed instructions beside the population, as a switch was noticed."""
    hurry: bool = False
    """Whether a switch was noticed in this cycle, so that its steps are left out for the next fast round."""


@dataclass(frozen=True)
class Taught(Stored):
    """What a distillation knows of its teacher: the weights that it begins with, under the long prompt."""

    score: float
    """On the validation set."""
    tokens_per_answer: float


@dataclass(frozen=True)
class State(Stored):
    """A run between two phases."""

    population: Population
    best: Best
    seed: Candidate | None = None
    """The program's instructions as given. None: an earlier version, which did not keep them, began the run."""
    cycle: int = 0
    """Cycles done."""
    phase: int = 0
    """Of the cycle that is under way, the last phase that is done. 0 between two cycles."""
    started: bool = False
    """Whether the start has been evaluated, before any cycle."""
    step: int = 0
    """Slow steps done, all cycles."""
    batch: int = 0
    """Batches of the data order used: what the next cycle starts from."""
    policy_version: int = 0
    """The newest version: what the next rollouts are sampled from."""
    rollouts: RolloutCounts = field(default_factory=RolloutCounts)
    reflection_calls: int = 0
    reflection_cost_usd: float | None = 0.0
    """None once a price was unknown."""
    for_groups: Rollouts = ()
    """Rollouts of the last fast round that the next step's groups have a place for, with `rollout.reuse`."""
    success: Mapping[str, Success] = field(default_factory=dict)
    """Example id -> how it went before this cycle, with `rollout.order="undecided"`: what its batches are drawn by."""
    success_now: Mapping[str, Success] = field(default_factory=dict)
    """The same with what this cycle's steps saw: what the next cycle goes by."""
    usage: Mapping[str, Usage] = field(default_factory=dict)
    """Model -> what the rollouts asked of LMs that are not trained."""
    tally: Tally = field(default_factory=Tally)
    """How all rollouts ended."""
    crashes: tuple[str, ...] = ()
    """What the program has raised in some of them, and where."""
    barren: int = 0
    """Fast rounds in a row in which there was nothing new to try, where the method searches under the same weights."""
    tried: tuple[str, ...] = ()
    """Ids of the candidates that such a search has tried so far."""
    search_over: str = ""
    """Why no more fast rounds follow, though rollouts for them are left. Empty while they do."""
    validated: Mapping[str, ValidationScore] = field(default_factory=dict)
    """Candidate id -> its last score on the validation set."""
    tokens: int = 0
    """Sampled from the policy, evaluations included."""
    val_score_before: float = 0.0
    test_score_before: float | None = None
    """Of the seed candidate at the start version. None without a test set."""
    ended: str = ""
    """Why the run is over: `done`, `budget` or `stopped`. Empty while it is not."""
    cap: str = ""
    """With `budget`: the setting in `budget` that was reached."""
    watch: Watch = field(default_factory=Watch)
    """What the monitors have seen."""
    warnings: tuple[str, ...] = ()
    """What was warned of besides the monitors' alarms, each once."""
    kept: Mapping[int, int] = field(default_factory=dict)
    """Cycles done -> the policy version that is kept from there, though no resume needs it: `run.keep_versions`."""
    stream: Stream | None = None
    """None: the run has one task."""
    ledger: Ledger | None = None
    """What decides where the next rollouts go. None: that is fixed, or nothing is decided yet."""
    validated_at: int = 0
    """Fast and slow rollouts at the last validation."""
    teacher: Taught | None = None
    """None: the run is no distillation, or its teacher is not scored yet."""
    alarms: Annotated[tuple[Alarm, ...], Field(exclude=True)] = ()
    """What they saw in the phase that just ended; not written down."""

    def validation(self, candidate: Candidate) -> ValidationScore | None:
        """The candidate's score on the validation set at the newest version; None where it has none yet."""
        found = self.validated.get(candidate.id)
        return found if found and found.policy_version == self.policy_version else None

    @property
    def over(self) -> bool:
        """Whether the run has ended, and the cycle in which it did is done."""
        return bool(self.ended) and not self.phase
