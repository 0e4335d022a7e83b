"""The words of the project. Read this first: every other module speaks in these.

Everything here is frozen: values flow from `evolve` to `collect` to `credit` to `update`, and nobody edits
another part's value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fst_optimizer.text import plain_data

if TYPE_CHECKING:
    import dspy

Texts = Mapping[str, str]
"""Component name -> text: one instruction for each predictor that evolves."""


class Outcome(StrEnum):
    """How a rollout ended. Everything but `OK` is recorded, rewarded by configuration, and never raised."""

    OK = "ok"
    PARSE_ERROR = "parse_error"
    """The completion did not fit the predictor's signature."""
    TRUNCATED = "truncated"
    """The answer could not be parsed because a completion ran into max_tokens."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """A prompt left no room in the model's context; it is never cut."""
    PROGRAM_ERROR = "program_error"
    """The program, or one of its tools, raised."""
    TIMEOUT = "timeout"
    """The rollout took longer than `rollout.timeout_s`."""
    ENGINE_ERROR = "engine_error"
    """The engine failed this request; trained on by nobody."""


@dataclass(frozen=True)
class Item:
    """One example with an id that stays the same through the run ("train-12")."""

    id: str
    example: dspy.Example


@dataclass(frozen=True)
class Candidate:
    """One set of instructions for the program, with where it came from."""

    texts: Texts
    parents: tuple[str, ...] = ()
    origin: str = "seed"
    """`seed`, `reflection`, `given` or `teacher`."""
    cycle: int = 0
    """The cycle whose fast round proposed it."""
    id: str = ""
    """A hash of the texts: the same texts are the same candidate, whoever proposed them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", MappingProxyType(dict(self.texts)))
        if not self.id:
            digest = hashlib.sha256(json.dumps(dict(self.texts), sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "id", digest[:12])

    def to_json(self) -> dict[str, Any]:
        """As written in `population/` and the checkpoint."""
        return {
            "id": self.id,
            "texts": dict(self.texts),
            "parents": list(self.parents),
            "origin": self.origin,
            "cycle": self.cycle,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_json`."""
        return cls(
            texts=data["texts"],
            parents=tuple(data["parents"]),
            origin=data["origin"],
            cycle=data["cycle"],
            id=data["id"],
        )


@dataclass(frozen=True)
class Population:
    """The candidates in use, with their scores at one policy version."""

    candidates: tuple[Candidate, ...]
    policy_version: int = 0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Candidate id -> example id -> score, all measured at `policy_version`. Empty before the first round."""

    def mean_score(self, candidate: Candidate) -> float:
        """The candidate's mean over the anchor, or 0 when it has not been scored."""
        scores = self.scores.get(candidate.id, {})
        return sum(scores.values()) / len(scores) if scores else 0.0

    @property
    def best(self) -> Candidate:
        """The candidate with the highest mean; the earliest wins a tie."""
        return max(self.candidates, key=self.mean_score)

    def leading(self, count: int) -> tuple[Candidate, ...]:
        """The candidates with the highest means, best first; the earlier wins a tie."""
        return tuple(sorted(self.candidates, key=self.mean_score, reverse=True)[:count])

    def to_json(self) -> dict[str, Any]:
        """As written in `population/` and the checkpoint."""
        return {
            "policy_version": self.policy_version,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "scores": {name: dict(scores) for name, scores in self.scores.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Population:
        """The inverse of `to_json`."""
        return cls(
            candidates=tuple(Candidate.from_json(entry) for entry in data["candidates"]),
            policy_version=data["policy_version"],
            scores=data["scores"],
        )


@dataclass(frozen=True)
class Call:
    """One completion that the policy sampled, exactly as it was sampled."""

    predictor: str
    """The component name, or "" when the call came from no known predictor."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Includes the end-of-turn token when the model produced it. Never tokenized again."""
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each completion token, in nats, at `temperature`."""
    temperature: float
    """0 means greedy; the log-probs are then those at temperature 1."""
    policy_version: int
    finish_reason: str
    """`stop` or `length`."""
    text: str = ""
    """The completion decoded, before any `<think>` part is stripped."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Call:
        """The inverse of `vars`, through JSON."""
        lists = ("prompt_ids", "completion_ids", "logprobs")
        given: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in data.items()}
        return cls(**given)


@dataclass(frozen=True)
class TraceStep:
    """One predictor's turn in a rollout, for the reflector to read."""

    predictor: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] | None
    """None when the completion could not be parsed."""
    completion: str
    """The raw completion."""


@dataclass(frozen=True)
class Usage:
    """What was asked of one LM that is not trained: an API model, a judge."""

    calls: int = 0
    prompt_tokens: int = 0
    """Those read from the provider's cache included."""
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


def total_usage(*parts: Mapping[str, Usage]) -> dict[str, Usage]:
    """The sum by model."""
    models = dict.fromkeys(model for part in parts for model in part)
    return {model: sum((part[model] for part in parts if model in part), Usage()) for model in models}


@dataclass(frozen=True)
class Rollout:
    """One run of one candidate's program on one example."""

    candidate_id: str
    example_id: str
    index: int
    """0 .. G-1 within its group."""
    policy_version: int
    outcome: Outcome
    score: float
    """The metric's number; 0 when the program gave nothing to score."""
    calls: tuple[Call, ...] = ()
    trace: tuple[TraceStep, ...] = ()
    feedback: Mapping[str, str] = field(default_factory=dict)
    """Predictor -> the metric's words for it; "" -> its words for the whole program. Only when asked for."""
    predictor_scores: Mapping[str, float] = field(default_factory=dict)
    """Predictor -> the metric's own score for it. Only when asked for."""
    error: str = ""
    """What went wrong, for people."""
    seconds: float = 0.0
    usage: Mapping[str, Usage] = field(default_factory=dict)
    """Model -> what the program and the metric asked of LMs that are not trained. Cached answers do not count."""

    @property
    def tokens(self) -> int:
        """Sampled tokens over all calls."""
        return sum(len(call.completion_ids) for call in self.calls)

    def to_json(self) -> dict[str, Any]:
        """As written in `journal/`. Inputs and outputs of the trace become text, as the reflector reads them."""
        trace = [replace(step, inputs=plain_data(step.inputs), outputs=_texts_of(step.outputs)) for step in self.trace]
        return {
            **vars(self),
            "feedback": dict(self.feedback),
            "predictor_scores": dict(self.predictor_scores),
            "calls": [vars(call) for call in self.calls],
            "trace": [vars(step) for step in trace],
            "usage": {model: asdict(used) for model, used in self.usage.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rollout:
        """The inverse of `to_json`."""
        return cls(
            **{
                **data,
                "outcome": Outcome(data["outcome"]),
                "calls": tuple(Call.from_json(call) for call in data["calls"]),
                "trace": tuple(TraceStep(**step) for step in data["trace"]),
                "usage": {model: Usage(**used) for model, used in data["usage"].items()},
            }
        )


def _texts_of(outputs: Mapping[str, Any] | None) -> Any:
    return None if outputs is None else plain_data(outputs)


@dataclass(frozen=True)
class Group:
    """All rollouts of one example that share a baseline, across candidates."""

    example_id: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class TrainRow:
    """One call with its credit: what the slow step sees."""

    call: Call
    advantage: float
    rollout: int
    """Which rollout of the batch the call belongs to (for per-rollout means)."""


@dataclass(frozen=True)
class RolloutCounts:
    """Program runs really executed, by purpose; `reused` counts those that served twice."""

    fast: int = 0
    slow: int = 0
    eval: int = 0
    reused: int = 0

    @property
    def training(self) -> int:
        """What a method pays to learn: fast + slow. Caps and comparisons count this."""
        return self.fast + self.slow

    def plus(self, **more: int) -> RolloutCounts:
        """A copy with some counts raised, e.g. `counts.plus(fast=12)`."""
        return RolloutCounts(**{name: count + more.get(name, 0) for name, count in self.to_json().items()})

    def to_json(self) -> dict[str, int]:
        """As written in every line of `metrics.jsonl`."""
        return {"fast": self.fast, "slow": self.slow, "eval": self.eval, "reused": self.reused}


def items_of(examples: Sequence[dspy.Example], split: str) -> tuple[Item, ...]:
    """Give every example the id `split-index`."""
    return tuple(Item(f"{split}-{index}", example) for index, example in enumerate(examples))
