"""Groups: which rollouts a fast round and a step ask for, and which of them share a baseline. Pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.rollout.shares import shares_of
from fst_optimizer.types import Candidate, Group, Item, Population, Rollout

if TYPE_CHECKING:
    from fst_optimizer.program.student import Teacher


def group_requests(
    population: Population, config: FSTConfig, teachers: Sequence[Teacher] = (), *, step: int
) -> Callable[[Item], list[Request]]:
    """Gives the requests of an example's group: G by `rollout.shares`, and those of the teachers.

    The step's number is in their seeds: where no weight has changed since an example's last turn, its old texts would
    come again, in flat groups again, for ever.
    """
    shares = shares_of(population, config.rollout.group_size, config.rollout.shares)
    members: list[tuple[Candidate, int | None]] = [
        (candidate, None) for candidate, share in zip(population.candidates, shares, strict=True) for _ in range(share)
    ]
    members += [(one.candidate, one.version) for one in teachers for _ in range(config.rollout.teacher_rollouts)]
    return lambda item: [
        Request(candidate, item, index, version, draw=f"step {step}")
        for index, (candidate, version) in enumerate(members)
    ]


def fast_requests(
    candidate: Candidate, items: Sequence[Item], temperature: float, cycle: int, asked: Counter[tuple[str, str]]
) -> list[Request]:
    """One rollout an example for a fast round. Greedy ones are always the same; sampled ones differ each time.

    `asked` counts how often the round has asked for this candidate on this example, and is raised. A round that is done
    again after a kill counts the same.
    """
    requests = []
    for item in items:
        draw = f"cycle {cycle}, {asked[candidate.id, item.id]}" if temperature else ""
        asked[candidate.id, item.id] += 1
        requests.append(Request(candidate, item, draw=draw))
    return requests


def grouped(rollouts: Sequence[Rollout]) -> tuple[Group, ...]:
    """All rollouts of one example are one group, across candidates; examples in order of appearance."""
    by_example: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_example[rollout.example_id].append(rollout)
    return tuple(Group(example_id, tuple(members)) for example_id, members in by_example.items())
