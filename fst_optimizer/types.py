"""The project's glossary, as types. Read this first: every other module is written in these words.

A *program* is a `dspy.Module`; a *predictor* is one `dspy.Predict` in it. Two things about a program are learned:

- its instructions: a `Candidate` has a text for each predictor that evolves, a `Population` the candidates in use;
- the weights of the *policy*, the local model that its predictors call: one LoRA adapter on a frozen base. Each update
  is published as the next *policy version*, which never changes afterwards; version 0 is the base without adapter.

A *cycle* is a fast round, a validation, T slow steps (`train.steps_per_cycle`) and another validation. Each of them is
a *phase*, with a checkpoint after it. The fast round is *evolve*; a slow step is *collect*, *credit* and *update*:

1. *evolve*: all candidates are scored at the newest policy version, on a few examples of the coming steps (the
   *anchor*). A reflector reads rollouts with the metric's feedback and proposes new candidates. Old and new together,
   those that are best on some anchor example are the frontier; its best K (`fast.population`) stay.
2. *collect*: G rollouts (`rollout.group_size`) of every example (`Item`) of a batch, as evenly over the candidates as
   they divide (or as `rollout.shares` says). Those of one example are a `Group`.
3. *credit*: a rollout's reward is the metric's score if its outcome is `ok`, otherwise the number configured for that
   outcome. Its advantage is the reward minus the group's mean, over the group's standard deviation. Each `Call` in it
   becomes a `TrainRow` with that advantage (by default; `train.credit="predictor"` gives each predictor a mean of its
   own). A group of equal rewards is *flat*: it carries no signal, and gives rows only where a KL penalty or an entropy
   bonus is set. A greedy call never gives one: no policy that samples chose its tokens.
4. *update*: one optimizer step on the rows, then the next policy version is published.

What is trained on: the tokens that the policy sampled in slow steps, under the candidates and under *teachers* (other
programs on the same policy, whose rollouts join the groups). The tokens of prompts are context alone; rollouts of the
fast round (but with `rollout.reuse`) and of validations, and what other LMs say, are not trained on.

An anchor score holds at one policy version: the next fast round measures every candidate anew, and until then the old
ones only say who leads. The best *pair* of candidate and policy version on the validation set keeps its score for the
whole run, and is what the compiled program carries.

All values are frozen: code makes new ones, and never changes one that it was given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import PlainSerializer, TypeAdapter

from fst_optimizer.text import plain_data

if TYPE_CHECKING:
    import dspy

Texts = Annotated[Mapping[str, str], PlainSerializer(dict)]
"""Component name -> text. A component is what evolves: the instruction of one predictor."""


_json_adapter: Callable[[type], TypeAdapter[Any]] = cache(TypeAdapter)


class Stored:
    """A value that a run's files hold as JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats are left as they are, NaN included."""
        data: dict[str, Any] = _json_adapter(type(self)).dump_python(self, mode="json")
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        value: Self = _json_adapter(cls).validate_python(data)
        return value


class Outcome(StrEnum):
    """How a rollout ended. A bad rollout is data: it earns what is configured for its outcome, and never raises."""

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
    """The engine failed this request, which says nothing about the policy: excluded from training and baselines."""


@dataclass(frozen=True)
class Item:
    """One example of the data, with an id that stays the same through the run ("train-12")."""

    id: str
    example: dspy.Example


@dataclass(frozen=True)
class Candidate(Stored):
    """One set of instructions for the program: what the fast round proposes, scores, keeps or drops."""

    texts: Texts
    parents: tuple[str, ...] = ()
    """Ids of the candidates that it was made from."""
    origin: str = "seed"
    """`seed` (the program as given), `reflection`, `merge` or `teacher`."""
    cycle: int = 0
    """The cycle whose fast round proposed it."""
    id: str = ""
    """A hash of the texts: the same texts are the same candidate, whoever proposed them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", MappingProxyType(dict(self.texts)))
        if not self.id:
            digest = hashlib.sha256(json.dumps(dict(self.texts), sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "id", digest[:12])

    def __reduce__(self) -> tuple[Any, ...]:
        """A read-only mapping can be neither copied nor pickled: it is made anew."""
        return type(self), (dict(self.texts), self.parents, self.origin, self.cycle, self.id)


@dataclass(frozen=True)
class Population(Stored):
    """The candidates in use, at most K of them, with their scores at one policy version."""

    candidates: tuple[Candidate, ...]
    policy_version: int = 0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Candidate id -> id of an anchor example -> score, all measured at `policy_version`. Empty before the first round,
    and measured anew in every round: the weights have changed since."""

    def mean_score(self, candidate: Candidate) -> float:
        """The candidate's mean over the anchor, or 0 when it has not been scored."""
        scores = self.scores.get(candidate.id, {})
        return sum(scores.values()) / max(1, len(scores))

    @property
    def best(self) -> Candidate:
        """The candidate with the highest mean; the earliest wins a tie."""
        return max(self.candidates, key=self.mean_score)

    def leading(self, count: int) -> tuple[Candidate, ...]:
        """The candidates with the highest means, best first; the earlier wins a tie."""
        return tuple(sorted(self.candidates, key=self.mean_score, reverse=True)[:count])


@dataclass(frozen=True)
class Call:
    """One completion that the policy sampled, exactly as it was sampled. Calls of other LMs are in `Usage` alone."""

    predictor: str
    """The component name, or "" when the call came from no known predictor."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """What is trained on: the ids as sampled, the end-of-turn token included where the model produced it. `text` is
    never tokenized again."""
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each completion token, in nats, at `temperature`."""
    temperature: float
    """0 means greedy; the log-probs are then those at temperature 1."""
    policy_version: int
    """The version that sampled it."""
    finish_reason: str
    """`stop` or `length`."""
    text: str = ""
    """The completion decoded, before any `<think>` part is stripped."""
    teacher_ids: tuple[int, ...] = ()
    """What `prompt_ids` would be under a teacher's instructions: in distillation alone, and empty where that cannot be
    told."""


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
    """What was asked of one LM that is not trained, such as an API model or a judge."""

    calls: int = 0
    prompt_tokens: int = 0
    """Those read from the provider's cache included."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0
    """Calls of which the provider told no tokens: what they cost is unknown."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: count + getattr(other, name) for name, count in vars(self).items()})


def total_usage(*parts: Mapping[str, Usage]) -> dict[str, Usage]:
    """Usage by model, summed over all parts."""
    models = dict.fromkeys(model for part in parts for model in part)
    return {model: sum((part[model] for part in parts if model in part), Usage()) for model in models}


@dataclass(frozen=True)
class Raised:
    """What a program raised, and where: two rollouts with the same `error` and `place` failed alike."""

    error: str
    """The exception's type."""
    place: str
    """`FILE:LINE in FUNCTION`: the innermost frame in the program's own code, or else the innermost of all."""
    lines: tuple[str, ...] = ()
    """The last lines of the traceback, without secrets."""

    def __str__(self) -> str:
        """The same for the same mistake."""
        return f"{self.error} at {self.place}" if self.place else self.error


@dataclass(frozen=True)
class Rollout:
    """One run of the program on one example, with one candidate's instructions and one policy version."""

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
    """What went wrong, for people to read."""
    seconds: float = 0.0
    """Wall-clock time that it took."""
    usage: Mapping[str, Usage] = field(default_factory=dict)
    """Model -> what the program and the metric asked of LMs that are not trained. Answers from a cache do not count."""
    raised: Raised | None = None
    """With `program_error`: what the program raised."""

    @property
    def lost(self) -> bool:
        """Whether the engine, or another LM, failed it: then it says nothing about the candidate or the policy."""
        return self.outcome is Outcome.ENGINE_ERROR

    @property
    def tokens(self) -> int:
        """Sampled tokens over all calls."""
        return sum(len(call.completion_ids) for call in self.calls)

    def to_json(self) -> dict[str, Any]:
        """As written in `journal/`. Inputs and outputs of the trace become text, as the reflector reads them.

        By hand, since every rollout is journalled: `Stored` takes four times as long for the thousands of tokens.
        """
        trace = [
            {name: None if value is None else plain_data(value) for name, value in vars(step).items()}
            for step in self.trace
        ]
        return {
            **vars(self),
            "feedback": dict(self.feedback),
            "predictor_scores": dict(self.predictor_scores),
            "calls": [_plain_call(call) for call in self.calls],
            "trace": trace,
            "usage": {model: vars(used) for model, used in self.usage.items()},
            "raised": self.raised and vars(self.raised),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rollout:
        """The inverse of `to_json`."""
        lists = ("prompt_ids", "completion_ids", "logprobs", "teacher_ids")
        parts = {
            "outcome": Outcome(data["outcome"]),
            "calls": tuple(
                Call(**{**call, **{name: tuple(call[name]) for name in lists if name in call}})
                for call in data["calls"]
            ),
            "trace": tuple(TraceStep(**step) for step in data["trace"]),
            "usage": {model: Usage(**used) for model, used in data["usage"].items()},
            "raised": Raised(**{**raised, "lines": tuple(raised["lines"])}) if (raised := data.get("raised")) else None,
        }
        return cls(**{**data, **parts})


def _plain_call(call: Call) -> dict[str, Any]:
    """All of a call, without what only distillation has where it is none."""
    data = dict(vars(call))
    if not call.teacher_ids:
        del data["teacher_ids"]
    return data


@dataclass(frozen=True)
class Group:
    """All rollouts of one example in a slow step, of all candidates and teachers. They share one baseline."""

    example_id: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class TrainRow:
    """One call with its advantage: what the optimizer step is computed from."""

    call: Call
    advantage: float
    """Above 0 makes the sampled tokens more likely, below 0 less likely."""
    rollout: int
    """Which rollout of the batch the call belongs to (for per-rollout means)."""
    group: int
    """Which group of the batch that rollout belongs to (for per-group means)."""
    flat: bool = False
    """Its rewards are all equal: the row is for the KL penalty and the entropy bonus alone, and its advantage is 0."""


@dataclass(frozen=True)
class RolloutCounts(Stored):
    """Program runs really executed, by purpose; `reused`: those of fast rounds that were used again without running.

    In the same round or, with `rollout.reuse`, in the groups of the step after it.
    """

    fast: int = 0
    slow: int = 0
    eval: int = 0
    reused: int = 0

    @property
    def training(self) -> int:
        """Rollouts that a method learns from, fast + slow: what caps and comparisons count."""
        return self.fast + self.slow

    def plus(self, **more: int) -> RolloutCounts:
        """A copy with some counts raised, e.g. `counts.plus(fast=12)`."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})


def items_of(examples: Sequence[dspy.Example], split: str) -> tuple[Item, ...]:
    """Give every example the id `split-index`."""
    return tuple(Item(f"{split}-{index}", example) for index, example in enumerate(examples))
