"""Claims over chains of the invented world: each says one property of every entity, and names only the first.

A false claim has one of these properties wrong, so a verdict needs every document of the chain.
"""

import itertools
import random
from dataclasses import dataclass

from fst_optimizer.task_kit import distinct, split_by_hash

from .world import KINDS, Entity, chain, entities

SUPPORTED, REFUTED = "SUPPORTED", "NOT_SUPPORTED"


@dataclass(frozen=True)
class Claim:
    """What is to be verified, with its answer."""

    text: str
    titles: tuple[str, ...]
    """The gold documents, in the order of the chain where that is known."""
    label: str
    """`SUPPORTED` or `NOT_SUPPORTED`."""


def draw_claims(split: str, count: int, hops: int, seed: int) -> list[Claim]:
    """Different claims whose first entity belongs to the split, about half of them false."""
    rng = random.Random(f"claims/{hops}/{split}/{seed}")
    long_enough = [kind.name for kind in KINDS[: len(KINDS) - hops + 1]]
    starts = [one for one in entities() if one.kind.name in long_enough and split_by_hash(one.title) == split]
    claims = (draw_claim(rng, chain(rng.choice(starts), hops)) for _ in itertools.count())
    return distinct(((claim.text, claim) for claim in claims), count)


def draw_claim(rng: random.Random, entities: tuple[Entity, ...]) -> Claim:
    """A claim about one chain, true or false with equal chances."""
    places = [rng.randrange(len(entity.values)) for entity in entities]
    wrong = rng.randrange(len(entities)) if rng.random() < 0.5 else None
    clauses = []
    for hop, (entity, place) in enumerate(zip(entities, places, strict=True)):
        value = entity.values[place]
        if hop == wrong:
            value = rng.choice([other for other in entity.kind.properties[place].values if other != value])
        subject = entity.kind.later if hop else entity.kind.first.format(entity.title)
        clauses.append(f"{subject} {entity.says(place, value)}")
    text = f"{', '.join(clauses[:-1])}, and {clauses[-1]}."
    return Claim(text, tuple(entity.title for entity in entities), SUPPORTED if wrong is None else REFUTED)
