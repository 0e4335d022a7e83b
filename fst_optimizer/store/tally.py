"""How rollouts ended: counted by outcome, with the first that did not end well, and what helps. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fst_optimizer.keys import without_secrets
from fst_optimizer.types import Outcome, Rollout, Stored

UNREADABLE = (Outcome.PARSE_ERROR, Outcome.TRUNCATED)
"""Outcomes that say that the answer's format failed."""

REMEDIES = {
    Outcome.PARSE_ERROR: "raise policy.max_tokens, simplify the signature, use another prompt format "
    "(dspy.configure(adapter=...)), or first train the policy on answers in the format (dspy.BootstrapFinetune)",
    Outcome.TRUNCATED: "raise policy.max_tokens, or ask for shorter answers",
    Outcome.PROMPT_TOO_LONG: "give shorter inputs or instructions, or a model with a longer context",
    Outcome.PROGRAM_ERROR: "correct the program, or let it handle what it raises",
    Outcome.TIMEOUT: "raise rollout.timeout_s, or find out what the program waits for",
    Outcome.ENGINE_ERROR: "see what the LM's server says, or lower rollout.num_threads",
}
"""What usually helps when many rollouts end so."""

MOST_CHARACTERS = 500
"""Of an error's text: it is repeated in every line of `metrics.jsonl`."""


@dataclass(frozen=True)
class FirstError(Stored):
    """The first rollout that did not end `ok`."""

    outcome: str
    text: str
    """What went wrong, without secrets."""
    example: str
    """The example's id."""

    def __str__(self) -> str:
        """On one line, for people."""
        return f"{self.outcome} on {self.example}: {' '.join(self.text.split())}"


@dataclass(frozen=True)
class Tally(Stored):
    """How some rollouts ended."""

    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Outcome -> how many; those that did not occur are left out."""
    first_error: FirstError | None = None
    """None when all ended `ok`."""

    def plus(self, other: Tally) -> Tally:
        """Both together; `other` came later."""
        return Tally(ordered(Counter(self.outcomes) + Counter(other.outcomes)), self.first_error or other.first_error)

    @property
    def total(self) -> int:
        """How many rollouts."""
        return sum(self.outcomes.values())

    @property
    def unread(self) -> bool:
        """Whether there are some, and not one answer could be parsed."""
        return bool(self.outcomes) and set(self.outcomes) <= set(UNREADABLE)


def tally_of(rollouts: Sequence[Rollout]) -> Tally:
    """How these ended; the first is the first of the sequence, whichever ended first."""
    return Tally(ordered(Counter(str(rollout.outcome) for rollout in rollouts)), first_error(rollouts))


def first_error(rollouts: Sequence[Rollout]) -> FirstError | None:
    """The first that did not end `ok`, if any."""
    failed = next((rollout for rollout in rollouts if rollout.outcome is not Outcome.OK), None)
    if failed is None:
        return None
    text = without_secrets(failed.error or str(failed.outcome))
    return FirstError(str(failed.outcome), text[:MOST_CHARACTERS], failed.example_id)


def commonest_failure(outcomes: Mapping[str, int]) -> tuple[Outcome, int] | None:
    """The commonest outcome besides `ok`, and how many ended so."""
    failures = {name: count for name, count in outcomes.items() if name != Outcome.OK}
    if not failures:
        return None
    name = max(failures, key=lambda one: failures[one])
    return Outcome(name), failures[name]


def ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """In the order of `Outcome`, whichever came first."""
    return {str(outcome): counts[outcome] for outcome in Outcome if counts.get(outcome)}
