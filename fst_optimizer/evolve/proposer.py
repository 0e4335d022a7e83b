"""From a parent's failures to a new candidate: asks the reflector, and keeps the lineage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from gepa.proposer.reflective_mutation.reflection_lm import ReflectionProposal

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflect import PERFECT, Answer, Ask, Reflector
from fst_optimizer.keys import without_secrets
from fst_optimizer.types import Candidate, Texts

logger = logging.getLogger(__name__)

Dataset = Mapping[str, Sequence[Mapping[str, Any]]]
"""Component -> what it did, in entries as `gepa_adapter.Entry` describes them."""
LONGEST = "fast.max_instruction_tokens"


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
    config: FastConfig
    count_tokens: Callable[[str], int]
    """Of a text, as the policy reads it."""
    tried: Collection[str] = ()
    """Ids of the candidates that earlier rounds of the same search have tried."""
    asked: int = 0
    """Of the last jobs, those for which the reflector was asked: an attempt that did not get there is no proposal."""
    too_long: int = 0
    """Texts that were over the limit of tokens."""
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
        return self._spent(0)

    @property
    def known(self) -> Mapping[str, Candidate]:
        """Every candidate of the round by its id, those that were rejected too."""
        return self._known

    def candidate(self, texts: Texts) -> Candidate:
        """The candidate with these texts, with its lineage."""
        return self._known[Candidate(texts).id]

    def reflect(
        self, candidate: dict[str, str], reflective_dataset: Dataset, components_to_update: list[str]
    ) -> tuple[ReflectionProposal, Proposer]:
        """One job of `reflect_many`."""
        return self.reflect_many([(candidate, reflective_dataset, components_to_update)])[0]

    def reflect_many(
        self, jobs: Sequence[tuple[dict[str, str], Dataset, list[str]]]
    ) -> list[tuple[ReflectionProposal, Proposer]]:
        """GEPA's reflection on several jobs: component -> new text for each, empty when there is nothing to try.

        Which texts count as seen before goes by the order of the jobs, not by who was answered first.
        """
        asks: list[Ask] = []
        owners: list[int] = []
        for place, (candidate, dataset, components) in enumerate(jobs):
            for name in components:
                entries = dataset.get(name, ())
                # A program may fail through another component: this one then has nothing to reflect on.
                fails = any(entry["Score"] < PERFECT for entry in entries)
                if name in self.components and fails and not self._spent(len(asks)):
                    asks.append(Ask(name, candidate[name], entries))
                    owners.append(place)
        self.asked = len(set(owners))
        written: list[dict[str, str]] = [{} for _ in jobs]
        for place, ask, answer in zip(owners, asks, self._answers(asks), strict=True):
            if (text := self._text(ask.component, answer)) is not None:
                written[place][ask.component] = text
        return [
            (ReflectionProposal(self._new(candidate, texts)), self)
            for (candidate, _, _), texts in zip(jobs, written, strict=True)
        ]

    def _spent(self, more: int) -> bool:
        """Whether the run's reflections are used up once so many more are made."""
        return self.reflections_left is not None and self.reflections + more >= self.reflections_left

    def _answers(self, asks: Sequence[Ask]) -> list[Answer]:
        try:
            return self.reflector.many(asks, self.config.parallel_proposals) if asks else []
        except StorageError as error:
            self.failure = error
            return [Answer(None, "the answer could not be written down")] * len(asks)

    def _text(self, name: str, answer: Answer) -> str | None:
        """The new text in an answer; None and a note where there is none that may be tried."""
        error, text, why = answer.error, answer.text, answer.note
        if error is not None:
            why = without_secrets(f"{type(error).__name__}: {error}")
            level = logging.DEBUG if self._warned else logging.WARNING  # a dead reflector fails at every proposal
            logger.log(level, "the reflector failed on %s, the proposal is lost: %s", name, why)
            self._warned = True
        self.failed += answer.lost
        if isinstance(text, str) and text.strip():
            text, most = text.strip(), self.config.max_instruction_tokens
            if most is None or (count := self.count_tokens(text)) <= most:
                return text
            self.notes.append(f"the text for {name} has {count} tokens, more than the {most} of {LONGEST}: not run")
            self.too_long += 1
            return None
        self.notes.append(f"no new text for {name}: {why or 'the reflector proposed nothing'}")
        return None

    def _new(self, parent: dict[str, str], written: dict[str, str]) -> dict[str, str]:
        """What is written, where it makes a candidate that the round does not have yet."""
        if not written:
            return {}
        child = Candidate({**parent, **written}, (self.candidate(parent).id,), "reflection", self.cycle)
        return written if self.take_in(child) else {}

    def take_in(self, child: Candidate) -> bool:
        """Know a new candidate from now on. False: the round has it already, and the same texts get the same scores."""
        if child.id in self._known:
            self.notes.append(f"candidate {child.id} was proposed again and not run")
            return False
        self._known[child.id] = child
        if child.id not in self.tried:
            self.new.append(child.id)
        return True
