"""Which examples a cycle's steps and its fast round use. Pure functions of the settings and the state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import Success, batch_at, by_undecided, undecided_batch
from fst_optimizer.types import Item


def next_batches(
    trainset: Sequence[Item], config: FSTConfig, first: int, known: Mapping[str, Success] | None = None
) -> list[tuple[Item, ...]]:
    """The T batches of a cycle, from batch number `first` of the data order on; `known`: how examples went."""
    size, numbers = config.rollout.batch_size, range(first, first + config.train.steps_per_cycle)
    if config.rollout.order == "undecided":
        return [undecided_batch(trainset, number, size, config.seed, known or {}) for number in numbers]
    return [batch_at(trainset, number, size, config.seed) for number in numbers]


def draw_anchor(batches: Sequence[Sequence[Item]], config: FSTConfig, cycle: int) -> tuple[Item, ...]:
    """Examples to score candidates on, drawn from those that the cycle's batches will use.

    With `rollout.reuse` those of the first batch come first: its groups can take these rollouts.
    """
    pool = list({item.id: item for batch in batches for item in batch}.values())
    random.Random(f"anchor/{config.seed}/{cycle}").shuffle(pool)
    if config.rollout.reuse != "none":
        first = {item.id for item in batches[0]}
        pool.sort(key=lambda item: item.id not in first)
    return tuple(pool[: config.fast.anchor_size])


def spare_examples(
    trainset: Sequence[Item],
    batch: Sequence[Item],
    config: FSTConfig,
    step: int,
    known: Mapping[str, Success] | None = None,
) -> list[Item]:
    """Examples that may take the place of flat ones in a step, in the order in which they are drawn."""
    own, name = {item.id for item in batch}, f"refill/{config.seed}/{step}"
    others = [item for item in trainset if item.id not in own]
    if config.rollout.order == "undecided":
        return by_undecided(others, known or {}, name)
    random.Random(name).shuffle(others)
    return others
