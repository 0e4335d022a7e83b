"""The rollouts of a step's groups: those that are known already, the first halves, what takes a flat one's place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.rollout.credit import teaches_nothing
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.types import Item, Population, Rollout

Place = tuple[str, int]
"""Example id and index in its group."""


class Execute(Protocol):
    """Runs requests at the newest policy version."""

    def __call__(self, requests: Sequence[Request], *, all_may_be_lost: bool) -> Sequence[Rollout]:
        """One rollout for each request, in order. `all_may_be_lost`: others of the step were answered before."""
        ...


@dataclass(frozen=True)
class Gathered:
    """The groups of a step."""

    rollouts: tuple[Rollout, ...]
    """Of all groups, one group after the other, those that were given up included."""
    ran: tuple[Rollout, ...]
    """Those of them that were run now: all but the reused ones."""
    given_up: int = 0
    """Groups of which no more than the first half was run, as its rewards were all equal."""
    refilled: int = 0
    """Examples that were drawn in their place."""

    @property
    def reused(self) -> int:
        """Rollouts that need not be run."""
        return len(self.rollouts) - len(self.ran)


def gather(
    groups: Sequence[Sequence[Request]],
    execute: Execute,
    config: FSTConfig,
    *,
    known: Mapping[Place, Rollout] | None = None,
    spare: Iterable[Sequence[Request]] = (),
    left: int,
) -> Gathered:
    """Run the groups of a step. By default all of their requests at once.

    Where flat groups are stopped, the first half of each comes first, under all of its prompts. A group whose rewards
    are all equal by then is given up, and `spare` groups of other examples take the places of such, as long as there
    are any, `rollout.refill` is not used up, and the `left` rollouts of the run pay for a whole group more. The second
    halves come last. All follows from the rollouts, so a step that is done again decides the same. What is `known` is
    not run again.
    """
    rollout, found, ran = config.rollout, dict(known or {}), list[Rollout]()
    halves = rollout.stop_flat or rollout.refill > 0

    def run(requests: Iterable[Request]) -> None:
        missing = unknown(requests, found)
        if missing:
            fresh = execute(missing, all_may_be_lost=bool(found))
            found.update(zip(map(place_of, missing), fresh, strict=True))
            ran.extend(fresh)

    waiting, begun, kept, refilled = list(groups), list[Sequence[Request]](), list[Sequence[Request]](), 0
    others = iter(spare)
    while waiting:
        run(request for group in waiting for request in (first_half(group) if halves else group))
        begun += waiting
        kept += [group for group in waiting if not (halves and teaches_nothing(_known_of(group, found), config))]
        owed = len(unknown((request for group in kept for request in group), found))
        paid = (left - len(ran) - owed) // max(map(len, waiting))
        waiting = list(islice(others, max(0, min(len(groups) - len(kept), rollout.refill - refilled, paid))))
        refilled += len(waiting)
    run(request for group in kept for request in group)
    rollouts = tuple(one for group in begun for one in _known_of(group, found))
    return Gathered(rollouts, tuple(ran), len(begun) - len(kept), refilled)


def place_of(request: Request) -> Place:
    """Which rollout of a step it asks for."""
    return request.item.id, request.index


def unknown(requests: Iterable[Request], known: Mapping[Place, Rollout]) -> list[Request]:
    """Those that must be run."""
    return [request for request in requests if place_of(request) not in known]


def first_half(group: Sequence[Request]) -> list[Request]:
    """Half of a group's requests, rounded up, as evenly over its prompts as they divide; in the group's order."""
    turns: dict[tuple[str, int | None], int] = defaultdict(int)
    order = []
    for request in group:
        prompt = request.candidate.id, request.version
        order.append((turns[prompt], request.index))
        turns[prompt] += 1
    first = {index for _, index in sorted(order)[: (len(group) + 1) // 2]}
    return [request for request in group if request.index in first]


def _known_of(group: Sequence[Request], found: Mapping[Place, Rollout]) -> list[Rollout]:
    return [found[place_of(request)] for request in group if place_of(request) in found]


# -- rollouts of a fast round in the groups of the step after it ----------------------------------------------------


def worth_keeping(
    ran: Sequence[Rollout], population: Population, batch: Sequence[Item], most: int
) -> tuple[Rollout, ...]:
    """Of a fast round's rollouts those that the next step's groups have a place for: at most `most` of a candidate.

    Without what the slow side does not read.
    """
    candidates, examples = {one.id for one in population.candidates}, {item.id for item in batch}
    taken: dict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for one in ran:
        pair = one.candidate_id, one.example_id
        if one.candidate_id in candidates and one.example_id in examples and not one.lost and taken[pair] < most:
            taken[pair] += 1
            kept.append(replace(one, trace=(), feedback={}, usage={}, seconds=0.0))
    return tuple(kept)


def known_places(groups: Sequence[Sequence[Request]], kept: Sequence[Rollout], version: int) -> dict[Place, Rollout]:
    """Places of a step's groups that rollouts of the same policy version, candidate and example take.

    A teacher's are its own.
    """
    waiting: dict[tuple[str, str], list[Rollout]] = defaultdict(list)
    for one in reversed(kept):
        if one.policy_version == version:
            waiting[one.candidate_id, one.example_id].append(one)
    found = {}
    for request in (request for group in groups for request in group):
        fitting = waiting[request.candidate.id, request.item.id]
        if request.version is None and fitting:
            found[place_of(request)] = replace(fitting.pop(), index=request.index)
    return found
