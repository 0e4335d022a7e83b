"""From a parent's failures to a new candidate: asks the reflector, and keeps the lineage."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.keys import without_secrets
from fst_optimizer.types import Candidate, Texts

logger = logging.getLogger(__name__)


@dataclass
class Proposer:
    """Writes new texts when GEPA asks for them, and knows every candidate of the round by its texts.

    GEPA hands candidates over as plain texts; what comes back from here has its parents, origin and cycle.
    """

    reflector: Reflector
    candidates: InitVar[Iterable[Candidate]]
    """Those that the round starts with."""
    components: Sequence[str]
    """Those that may change."""
    cycle: int
    reflections_left: int | None
    """Reflections that the run may still make. None: no cap."""
    notes: list[str]
    """Gets a line for every reflection that came to nothing."""
    tried: Collection[str] = ()
    """Ids of the candidates that earlier rounds of the same search have tried."""
    asked: bool = False
    """Whether the reflector was asked. The round resets it: an attempt that did not get there is no proposal."""
    failure: StorageError | None = None
    """Why an answer could not be written down. GEPA would only log it, so the round looks here and raises."""

    def __post_init__(self, candidates: Iterable[Candidate]) -> None:
        self._known = {candidate.id: candidate for candidate in candidates}
        self._calls_before = self.reflector.calls
        self.new: list[str] = []
        """Ids of the proposals of this round whose texts no round has tried before."""
        self.failed = 0
        """Reflections that came to nothing because the reflector failed, for a reason that may pass."""
        self._warned = False

    @property
    def reflections(self) -> int:
        """Reflections made in this round."""
        return self.reflector.calls - self._calls_before

    @property
    def exhausted(self) -> bool:
        """Whether the run's reflections are used up."""
        return self.reflections_left is not None and self.reflections >= self.reflections_left

    def candidate(self, texts: Texts) -> Candidate:
        """The candidate with these texts, with its lineage."""
        return self._known[Candidate(texts).id]

    def __call__(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """GEPA's `custom_candidate_proposer`: component -> new text, empty when there is nothing to try."""
        written: dict[str, str] = {}
        for name in components_to_update:
            dataset = reflective_dataset.get(name, ())
            # A program may fail through another component: this one then has nothing to reflect on.
            fails = any(entry["Score"] < PERFECT for entry in dataset)
            if name in self.components and fails and not self.exhausted:
                self.asked = True
                text = self._reflect(name, candidate[name], dataset)
                if text is not None:
                    written[name] = text
        if not written:
            return {}
        child = Candidate({**candidate, **written}, (self.candidate(candidate).id,), "reflection", self.cycle)
        if child.id in self._known:  # the same texts would get the same scores
            self.notes.append(f"candidate {child.id} was proposed again and not run")
            return {}
        self._known[child.id] = child
        if child.id not in self.tried:
            self.new.append(child.id)
        return written

    def _reflect(self, name: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            text = self.reflector(name, current, dataset)
        except StorageError as error:
            self.failure = error
            return None
        except Exception as error:
            why = without_secrets(f"{type(error).__name__}: {error}")
            level = logging.DEBUG if self._warned else logging.WARNING  # a dead reflector fails at every proposal
            logger.log(level, "the reflector failed on %s, the proposal is lost: %s", name, why)
            self._warned = True
            self.failed += 1
        else:
            if isinstance(text, str) and text.strip():
                return text.strip()
            why = getattr(self.reflector, "note", "") or "the reflector proposed nothing"
            self.failed += getattr(self.reflector, "lost", False) and not self.reflector.failure
        self.notes.append(f"no new text for {name}: {why}")
        return None
