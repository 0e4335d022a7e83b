"""The groups of one slow step: which rollouts they ask for, and having them run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fst_optimizer import schedule
from fst_optimizer.rollout.gather import Gathered, Place, gather, known_places
from fst_optimizer.rollout.groups import group_requests
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.run.batches import spare_examples
from fst_optimizer.run.run import Run
from fst_optimizer.run.state import State
from fst_optimizer.types import Item, Population, Rollout


@dataclass(frozen=True)
class StepGroups:
    """What a step asks for."""

    groups: Sequence[Sequence[Request]]
    known: Mapping[Place, Rollout]
    """Rollouts of the fast round that take places in them."""
    spare: Iterable[Sequence[Request]]
    """Groups of other examples, for those that turn out flat."""

    @property
    def to_run(self) -> int:
        """Rollouts that are not known yet."""
        return sum(map(len, self.groups)) - len(self.known)


def groups_of_step(run: Run, state: State, population: Population, batch: Sequence[Item]) -> StepGroups:
    """A group for each example of a batch, under a population's prompts at the newest version."""
    config = run.config
    group_of = group_requests(population, config, run.teachers, step=state.step)
    groups, others = [group_of(item) for item in batch], list[Item]()
    if config.rollout.refill:
        others = spare_examples(run.trainset_at(state), batch, config, state.step, state.success)
    return StepGroups(
        groups,
        known_places(groups, state.for_groups, state.policy_version),
        map(group_of, schedule.unlearned(config, state, others)),
    )


def collect(run: Run, state: State, asked: StepGroups) -> Gathered:
    """The rollouts of a step's groups; those that are run now are counted as `slow`."""
    config, counting = run.config, run.metrics.counting("slow", asked.to_run)

    def execute(requests: Sequence[Request], *, all_may_be_lost: bool) -> Sequence[Rollout]:
        return run.collector.run(
            requests,
            version=state.policy_version,
            temperature=config.rollout.temperature,
            capture=config.train.credit == "predictor",
            on_rollout=counting,
            all_may_be_lost=all_may_be_lost,
        )

    left = schedule.rollouts_left(config, state)
    found = gather(asked.groups, execute, config, known=asked.known, spare=asked.spare, left=left)
    run.meter.add_reused(found.reused)
    return found
