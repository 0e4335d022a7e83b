"""Claims over chains of the invented world: each says one property of every entity, and names only the first.

A false claim has one of these properties wrong, so a verdict needs every document of the chain.
"""

import hashlib
import random
from dataclasses import dataclass

from .world import KINDS, Entity, chain, entities

SPLITS = {"train": (0, 1), "val": (2,), "test": (3,)}
"""Which quarters of all first entities, told apart by their hash, belong to a split."""
SUPPORTED, REFUTED = "SUPPORTED", "NOT_SUPPORTED"


@dataclass(frozen=True)
class Claim:
    """What is to be verified, with its answer."""

    text: str
    titles: tuple[str, ...]
    """The gold documents, in the order of the chain where that is known."""
    label: str
    """`SUPPORTED` or `NOT_SUPPORTED`."""


def split_of(text: str) -> str:
    """The split that a text belongs to, decided by its hash alone."""
    quarter = hashlib.sha256(text.encode()).digest()[0] % 4
    return next(split for split, quarters in SPLITS.items() if quarter in quarters)


def draw_claims(split: str, count: int, hops: int, seed: int) -> list[Claim]:
    """Different claims whose first entity belongs to the split, about half of them false."""
    rng = random.Random(f"claims/{hops}/{split}/{seed}")
    long_enough = [kind.name for kind in KINDS[: len(KINDS) - hops + 1]]
    starts = [one for one in entities() if one.kind.name in long_enough and split_of(one.title) == split]
    drawn: dict[str, Claim] = {}
    while len(drawn) < count:
        claim = draw_claim(rng, chain(rng.choice(starts), hops))
        drawn.setdefault(claim.text, claim)
    return list(drawn.values())


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
