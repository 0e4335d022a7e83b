"""A table of invented goods and their makers, the same every time."""

import random
from dataclasses import dataclass
from functools import cache

SEED = "invented goods"
ADJECTIVES = ("brindle", "tarnish", "hollow", "sable", "crooked", "amber", "marsh", "winter", "copper", "speckled")
THINGS = ("lantern", "kettle", "whistle", "satchel", "trowel", "spindle", "goblet", "bellows")
MAKERS = ("Ovrik", "Tamsel", "Quendry", "Bolmar", "Hasprin", "Yelvane", "Drossel", "Wickrow")


@dataclass(frozen=True)
class Good:
    """One row of the goods."""

    name: str
    price: float
    """Of one piece, in coins."""
    weight: float
    """Of one piece, in ounces."""
    stock: int
    maker: str

    def record(self) -> str:
        """What the lookup shows."""
        return (
            f"{self.name}: price {self.price:g} coins, weight {self.weight:g} ounces, "
            f"stock {self.stock} pieces, maker {self.maker}"
        )


@dataclass(frozen=True)
class Maker:
    """One row of the makers."""

    name: str
    rebate: int
    """Per cent off its goods' prices."""

    def record(self) -> str:
        """What the lookup shows."""
        return f"{self.name}: rebate {self.rebate} per cent on its goods"


@cache
def goods() -> tuple[Good, ...]:
    """All goods; prices in quarters of a coin, weights in tenths of an ounce."""
    rng = random.Random(SEED)
    return tuple(
        Good(
            f"{adjective} {thing}",
            rng.randint(9, 399) / 4,
            rng.randint(15, 480) / 10,
            rng.randint(11, 240),
            rng.choice(MAKERS),
        )
        for adjective in ADJECTIVES
        for thing in THINGS
    )


@cache
def makers() -> dict[str, Maker]:
    """All makers by name."""
    rng = random.Random(f"makers of {SEED}")
    return {name: Maker(name, rng.randint(3, 40)) for name in MAKERS}


@cache
def records() -> dict[str, str]:
    """Everything that can be looked up: lower-case name -> record."""
    rows: tuple[Good | Maker, ...] = (*goods(), *makers().values())
    return {row.name.lower(): row.record() for row in rows}
