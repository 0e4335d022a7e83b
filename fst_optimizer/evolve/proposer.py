"""From a parent's failures to a new candidate: asks the reflector, and keeps the lineage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.text import without_secrets
from fst_optimizer.types import Candidate, Texts

logger = logging.getLogger(__name__)


class Proposer:
    """Writes new texts when GEPA asks for them, and knows every candidate of the round by its texts.

    GEPA hands candidates over as plain texts; what comes back from here has its parents, origin and cycle.

    Args:
        reflector: Proposes texts.
        candidates: Those that the round starts with.
        components: The components that may change.
        cycle: Written into new candidates.
        reflections_left: Reflections that the run may still make. None: no cap.
        notes: Gets a line for every reflection that came to nothing.
    """

    def __init__(
        self,
        reflector: Reflector,
        candidates: Iterable[Candidate],
        components: Sequence[str],
        cycle: int,
        reflections_left: int | None,
        notes: list[str],
    ) -> None:
        self.components = tuple(components)
        self.asked = False
        """Whether the reflector was asked. The round resets it: an attempt that did not get there is no proposal."""
        self.failure: StorageError | None = None
        """Why an answer could not be written down. GEPA would only log it, so the round looks here and raises."""
        self.notes = notes
        self._reflector = reflector
        self._known = {candidate.id: candidate for candidate in candidates}
        self._cycle = cycle
        self._left = reflections_left
        self._calls_before = reflector.calls
        self._warned = False

    @property
    def reflections(self) -> int:
        """Reflections made in this round."""
        return self._reflector.calls - self._calls_before

    @property
    def exhausted(self) -> bool:
        """Whether the run's reflections are used up."""
        return self._left is not None and self.reflections >= self._left

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
        return written if written and self._is_new(candidate, written) else {}

    def _is_new(self, parent: Texts, written: Texts) -> bool:
        """Register the child, unless this round has its texts already: they would get the same scores."""
        child = Candidate({**parent, **written}, (self.candidate(parent).id,), "reflection", self._cycle)
        if child.id in self._known:
            self.notes.append(f"candidate {child.id} was proposed again and not run")
            return False
        self._known[child.id] = child
        return True

    def _reflect(self, name: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            text = self._reflector(name, current, dataset)
        except StorageError as error:
            self.failure = error
            return None
        except Exception as error:
            why = without_secrets(f"{type(error).__name__}: {error}")
            level = logging.DEBUG if self._warned else logging.WARNING  # a dead reflector fails at every proposal
            logger.log(level, "the reflector failed on %s, the proposal is lost: %s", name, why)
            self._warned = True
        else:
            if isinstance(text, str) and text.strip():
                return text.strip()
            why = getattr(self._reflector, "note", "") or "the reflector proposed nothing"
        self.notes.append(f"no new text for {name}: {why}")
        return None
