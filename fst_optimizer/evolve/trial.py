"""A new candidate against what it was made from: the scores of both on the same examples, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fst_optimizer.evolve.paired import verdict
from fst_optimizer.stats import mean
from fst_optimizer.types import Candidate

Pair = tuple[float, float]
"""The parent's and the new candidate's score on one example; NaN for one that was lost."""


@dataclass
class Trial:
    """One comparison. It grows as examples are drawn."""

    candidate: Candidate
    parents: list[int]
    """Places in the search of what it was made from."""
    before: Mapping[str, float]
    """The parent's scores on the anchor; a merge is compared with the better of its two."""
    minibatch: Sequence[str]
    """Ids of the examples that it was made from, or chosen on."""
    seen: list[Pair]
    """On those."""
    fresh: list[Pair] = field(default_factory=list)
    """On examples that were drawn after them."""
    ties: bool = False
    """Whether equal sums are enough. So GEPA takes merges."""

    @property
    def conclusive(self) -> bool:
        """Whether at least half of what was drawn was answered under both."""
        drawn = [*self.seen, *self.fresh]
        return 2 * len(_answered(drawn)) >= len(drawn)

    @property
    def sum_is_better(self) -> bool:
        """GEPA's rule: the sum of scores went up; over what was answered under both."""
        pairs = _answered([*self.seen, *self.fresh])
        before, after = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return after > before or (self.ties and after == before)

    @property
    def verdict(self) -> str:
        """What the paired test says so far: `better`, `no better` or `open`."""
        return verdict(_differences(self.seen), _differences(self.fresh))

    @property
    def passes_paired(self) -> bool:
        """Whether it is taken when no more examples are drawn: what is open then goes by the sum over all of them."""
        found = self.verdict
        return found == "better" or (found == "open" and self.sum_is_better)

    def told(self) -> str:
        """The outcome in a few words, for a note."""
        differences = _differences([*self.seen, *self.fresh])
        return f"{self.verdict} on {len(differences)} examples, by {mean(differences or [0.0]):+.3f} on average"


def _answered(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if not any(map(math.isnan, pair))]


def _differences(pairs: Sequence[Pair]) -> list[float]:
    return [after - before for before, after in _answered(pairs)]
