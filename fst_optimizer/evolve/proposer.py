"""From a parent's failures to a new candidate: asks the reflector, and keeps the lineage."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.text import without_secrets
from fst_optimizer.types import Candidate, Texts

logger = logging.getLogger(__name__)


class Author:
    """Writes new texts when GEPA asks for them, and knows every candidate of the round by its texts.

    GEPA hands candidates over as plain texts; what comes back from here has its parents, origin and cycle.
    """

    def __init__(
        self,
        reflector: Reflector,
        known: dict[str, Candidate],
        components: Sequence[str],
        cycle: int,
        reflections_left: int | None,
        notes: list[str],
    ) -> None:
        """`known`, by `text_key`, grows by every candidate written; `notes` by every reflection that failed."""
        self.components = tuple(components)
        self.asked = False
        """Whether the last attempt reached the reflector: one that did not is no proposal."""
        self.notes = notes
        self._reflector = reflector
        self._known = known
        self._cycle = cycle
        self._left = reflections_left
        self._calls_before = reflector.calls
        self.failure: StorageError | None = None
        """Why an answer could not be written down. GEPA would only log it, so the round looks here and raises."""
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
        return self._known[text_key(texts)]

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
            if name in self.components and not self.exhausted and _fails(dataset):
                self.asked = True
                text = self._reflect(name, candidate[name], dataset)
                written |= {} if text is None else {name: text}
        return written if written and self._register(candidate, written) else {}

    def _register(self, parent: Texts, written: Texts) -> bool:
        """Whether the texts are new to this round: the same texts would earn the same scores."""
        child = Candidate({**parent, **written}, (self.candidate(parent).id,), "reflection", self._cycle)
        if text_key(child.texts) in self._known:
            self.notes.append(f"candidate {child.id} was proposed again and not run")
            return False
        self._known[text_key(child.texts)] = child
        return True

    def _reflect(self, name: str, current: str, dataset: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            text = self._reflector(name, current, dataset)
        except StorageError as error:
            self.failure = error
            return None
        except Exception as error:
            self._warn_once(name, error)
            self.notes.append(without_secrets(f"no new text for {name}: {type(error).__name__}: {error}"))
            return None
        if isinstance(text, str) and text.strip():
            return text.strip()
        why = getattr(self._reflector, "note", "") or "the reflector proposed nothing"
        self.notes.append(f"no new text for {name}: {why}")
        return None

    def _warn_once(self, name: str, error: Exception) -> None:
        """A dead reflector would say the same at every proposal."""
        level = logging.DEBUG if self._warned else logging.WARNING
        said = without_secrets(f"{type(error).__name__}: {error}")
        logger.log(level, "the reflector failed on %s, the proposal is lost: %s", name, said)
        self._warned = True


def text_key(texts: Texts) -> str:
    """What tells candidates apart: their texts."""
    return Candidate(texts).id


def _fails(dataset: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this component has a failure to reflect on: it may be another's fault that the program failed."""
    return any(entry["Score"] < PERFECT for entry in dataset)
