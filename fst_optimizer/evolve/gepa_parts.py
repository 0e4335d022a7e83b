"""GEPA's parts, put together for a search that starts from a whole scored population."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer
from gepa.strategies.acceptance import StrictImprovementAcceptance
from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import ParetoCandidateSelector
from gepa.strategies.component_selector import AllReflectionComponentSelector, RoundRobinReflectionComponentSelector

from fst_optimizer.evolve.gepa_adapter import GepaAdapter
from fst_optimizer.evolve.reflect import PERFECT
from fst_optimizer.types import Candidate, Item

logger = logging.getLogger(__name__)

State = GEPAState[Any, Any]


def state_of(
    candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, float]], components: Sequence[str], turn: int
) -> State:
    """GEPA's state as if it had just scored this population; 0.1.4 can only be started from one seed.

    The ancestor that it is told for all but the first is not true and not used: `Candidate.parents` is the lineage.
    `turn` is the component that round robin starts with.
    """
    first, *others = candidates
    state: State = GEPAState(dict(first.texts), evaluation(scores[first.id]))
    state.num_full_ds_evals = len(candidates)
    state.total_num_evals = sum(len(row) for row in scores.values())
    for candidate in others:
        add_to(state, candidate, [0], scores[candidate.id])
    state.list_of_named_predictors = list(components)
    state.named_predictor_id_to_update_next_for_program_candidate = [turn % len(components)] * len(candidates)
    return state


def add_to(state: State, candidate: Candidate, parents: list[int], row: Mapping[str, float]) -> None:
    """Tell GEPA of one more scored candidate."""
    state.update_state_with_new_program(parents, dict(candidate.texts), evaluation(row), None, 0)


def next_iteration(state: State) -> None:
    """What GEPA's engine does before each proposal, and its proposer relies on."""
    state.i += 1
    state.full_program_trace.append({"i": state.i})


def improves(proposal: CandidateProposal[Any], state: State) -> bool:
    """GEPA's rule: the minibatch's sum of scores went up."""
    return StrictImprovementAcceptance().should_accept(proposal, state)


def evaluation(row: Mapping[str, float]) -> ValsetEvaluation[Any, Any]:
    """A candidate's scores, as GEPA takes them."""
    return ValsetEvaluation(outputs_by_val_id={}, scores_by_val_id=dict(row))


def proposer(
    gepa_adapter: GepaAdapter,
    author: Callable[..., dict[str, str]],
    items: Sequence[Item],
    minibatch: int,
    which: str,
    seed: str,
) -> ReflectiveMutationProposer:
    """GEPA's reflective proposer: Pareto parents, shuffled minibatches, `round_robin` or `all` components."""
    return ReflectiveMutationProposer(
        logger=_DebugLog(),
        trainset=list(items),
        adapter=gepa_adapter,  # type: ignore[arg-type]  # GEPA allows None for propose_new_texts, its protocol does not say so
        candidate_selector=ParetoCandidateSelector(random.Random(f"parents/{seed}")),
        module_selector=AllReflectionComponentSelector() if which == "all" else RoundRobinReflectionComponentSelector(),
        batch_sampler=EpochShuffledBatchSampler(minibatch, random.Random(f"minibatches/{seed}")),
        perfect_score=PERFECT,
        skip_perfect_score=True,
        experiment_tracker=ExperimentTracker(),
        custom_candidate_proposer=author,
    )


class _DebugLog:
    """GEPA narrates every step to its logger, which prints by default."""

    def log(self, message: str) -> None:
        logger.debug("gepa: %s", message)
