"""GEPA's interface over this package: rollouts as its trajectories, its proposer over a population that is scored.

DSPy's own GEPA adapter runs programs itself; this one leaves that to the collector and only translates.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gepa.core.adapter import EvaluationBatch
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer
from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import ParetoCandidateSelector
from gepa.strategies.component_selector import AllReflectionComponentSelector, RoundRobinReflectionComponentSelector
from gepa.strategies.proposal_sampling import PxNSampling

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import FSTError
from fst_optimizer.evolve.proposer import Proposer
from fst_optimizer.evolve.reflect import PERFECT
from fst_optimizer.text import plain_data
from fst_optimizer.types import Candidate, Item, Rollout, Texts

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
"""One example to reflect on. `Inputs`, `Generated Outputs` and `Feedback` are what GEPA's prompt shows. `Score` is
this component's, `Metric Feedback` the metric's own words and `Instance` the example's labels as text: the
extractive reflector reads them."""


@dataclass(frozen=True)
class Trajectory:
    """A rollout with the example it ran on: what GEPA calls a trajectory."""

    item: Item
    rollout: Rollout


Wanted = Sequence[tuple[Texts, Sequence[Item]]]
"""Candidates as GEPA has them, each with the items to run it on."""


class GepaAdapter:
    """The adapter object that GEPA asks: `run(wanted)` executes rollouts, or finds them among those that ran."""

    propose_new_texts = None
    """Must be None: GEPA would call it in place of our reflector."""

    def __init__(self, run: Callable[[Wanted], Sequence[Sequence[Rollout]]]) -> None:
        """`run` returns one rollout per candidate and item, in order, with trace and feedback captured."""
        self._run = run
        self.failure: Exception | None = None
        """What broke while a dataset was built. GEPA only logs it: `GepaSearch.propose` raises it."""

    def evaluate(
        self, batch: list[Item], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Trajectory, Rollout]:
        """Scores and trajectories of one candidate on some items; NaN is the score of a rollout that was lost."""
        return self.batch_evaluate([(candidate, batch)])[0]

    def batch_evaluate(
        self, items: Sequence[tuple[dict[str, str], list[Item]]]
    ) -> list[EvaluationBatch[Trajectory, Rollout]]:
        """The same of several candidates, run as one batch."""
        return [
            EvaluationBatch(
                outputs=list(rollouts),
                scores=[math.nan if rollout.lost else rollout.score for rollout in rollouts],
                trajectories=[Trajectory(item, rollout) for item, rollout in zip(batch, rollouts, strict=True)],
            )
            for (_, batch), rollouts in zip(items, self._run(items), strict=True)
        ]

    def make_reflective_dataset(
        self,
        candidate: dict[str, str],
        eval_batch: EvaluationBatch[Trajectory, Rollout],
        components_to_update: list[str],
    ) -> dict[str, list[Entry]]:
        """Per component, one entry for each rollout that reached it."""
        try:
            trajectories = eval_batch.trajectories or []
            return {name: reflective_entries(name, trajectories) for name in components_to_update}
        except Exception as error:
            self.failure = error
            raise


class GepaSearch:
    """GEPA's reflective proposer, started from a whole scored population."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        scores: Mapping[str, Mapping[str, float]],
        adapter: GepaAdapter,
        proposer: Proposer,
        items: Sequence[Item],
        config: FastConfig,
        *,
        turn: int,
        seed: str,
    ) -> None:
        """`turn` is the component that round robin starts with; `seed` decides parents and minibatches."""
        self._adapter = adapter
        # GEPA's state as if it had just scored this population; 0.1.4 can only be started from one seed.
        first, *others = candidates
        self._state: GEPAState[Any, Any] = GEPAState(dict(first.texts), _evaluation(scores[first.id]))
        self._state.num_full_ds_evals = len(candidates)
        self._state.total_num_evals = sum(len(row) for row in scores.values())
        for candidate in others:
            # GEPA wants a parent: this one is made up and not used. `Candidate.parents` is the lineage.
            self.add(candidate, [0], scores[candidate.id])
        components = list(proposer.components)
        self._state.list_of_named_predictors = components
        self._state.named_predictor_id_to_update_next_for_program_candidate = [turn % len(components)] * len(candidates)
        every = config.components == "all"
        self._sampling = PxNSampling(p=1, n=1)
        self._proposer = ReflectiveMutationProposer(
            logger=_DebugLog(),
            trainset=list(items),
            adapter=adapter,  # type: ignore[arg-type]  # GEPA allows None for propose_new_texts, its protocol does not say so
            candidate_selector=ParetoCandidateSelector(random.Random(f"parents/{seed}")),
            module_selector=AllReflectionComponentSelector() if every else RoundRobinReflectionComponentSelector(),
            batch_sampler=_OneAfterTheOther(min(config.minibatch, len(items)), random.Random(f"minibatches/{seed}")),
            perfect_score=PERFECT,
            skip_perfect_score=True,
            experiment_tracker=ExperimentTracker(),
            reflection_strategy=proposer,
            sampling_strategy=self._sampling,
        )

    def propose(self, count: int = 1) -> Sequence[CandidateProposal[Any]]:
        """So many times: choose a parent, a minibatch and components, reflect, and try the new texts on the minibatch.

        The reflections are made side by side, and so are the rollouts. Those that come to something are returned, in
        the order in which their parents were drawn.

        Raises:
            FSTError: The examples to reflect on could not be built.
        """
        # What GEPA's engine does before each proposal, and its proposer relies on.
        self._state.full_program_trace.append({"i": self._state.i + 1})
        self._sampling.p = count
        proposals = self._proposer.propose(self._state)
        if self._adapter.failure is not None:
            raise FSTError("building the examples to reflect on failed") from self._adapter.failure
        return proposals

    def add(self, candidate: Candidate, parents: list[int], scores: Mapping[str, float]) -> None:
        """Take in an accepted proposal, scored on the whole anchor."""
        self._state.update_state_with_new_program(parents, dict(candidate.texts), _evaluation(scores), None, 0)

    def leave_out(self, examples: Collection[str]) -> None:
        """Forget all scores on these examples of the anchor."""
        state = self._state
        for scores in (*state.prog_candidate_val_subscores, state.pareto_front_valset):
            for example in examples:
                scores.pop(example, None)
        for example in examples:
            state.program_at_pareto_front_valset.pop(example, None)


def _evaluation(scores: Mapping[str, float]) -> ValsetEvaluation[Any, Any]:
    return ValsetEvaluation(outputs_by_val_id={}, scores_by_val_id=dict(scores))


class _OneAfterTheOther(EpochShuffledBatchSampler[Any, Any]):
    """The minibatches of proposals in flight together are those that they would get one after the other.

    GEPA shuffles anew only between iterations: in one that draws more than an epoch, the same minibatches come again,
    and with them the same prompts.
    """

    drawn = 0

    def next_minibatch_ids(self, loader: Any, state: GEPAState[Any, Any]) -> list[Any]:
        state.i, self.drawn = self.drawn, self.drawn + 1
        ids: list[Any] = super().next_minibatch_ids(loader, state)
        return ids


class _DebugLog:
    """GEPA logs every step to its logger, which prints by default."""

    def log(self, message: str) -> None:
        logger.debug("gepa: %s", message)


def reflective_entries(component: str, trajectories: Sequence[Trajectory]) -> list[Entry]:
    """What the reflector reads about one component. An example that came twice is shown once."""
    unique = {trajectory.item.id: trajectory for trajectory in trajectories}.values()
    return [entry for trajectory in unique if (entry := _entry(component, trajectory)) is not None]


def _entry(component: str, trajectory: Trajectory) -> Entry | None:
    """None when the rollout never reached the component, or was lost."""
    rollout = trajectory.rollout
    if rollout.lost:
        return None
    steps = [step for step in rollout.trace if step.predictor == component]
    if not steps:
        return None
    # The first that failed to parse, else the last, whose inputs hold the most of a loop's history.
    step = next((step for step in steps if step.outputs is None), steps[-1])
    score = rollout.predictor_scores.get(component, rollout.score)
    words = (rollout.feedback.get(component) or rollout.feedback.get("", "")).strip()
    if step.outputs is None:
        outputs = f"Could not be parsed into the output fields. The raw response was:\n```\n{step.completion}\n```"
        problem = "The response could not be parsed, so it earned nothing."
        feedback = "\n".join(part for part in (problem, rollout.error, words) if part)
    else:
        outputs = plain_data(step.outputs)
        failure = f"\nThe program then failed: {rollout.error}" if rollout.error else ""
        feedback = words or f"This response got a score of {score:g}.{failure}"
    return {
        "Inputs": plain_data(step.inputs),
        "Generated Outputs": outputs,
        "Feedback": feedback,
        "Score": score,
        "Metric Feedback": words,
        "Instance": tuple(str(value) for value in trajectory.item.example.labels().values()),
    }
