"""An invented world, the same every time: objects, their makers, the makers' towns, rivers and ranges.

A document is one entity: a link to the next kind (an object to its maker, a maker to a town, ...) and three
properties. No name, date or craft in it is real.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

SEED = "an invented world"


@dataclass(frozen=True)
class Property:
    """Something that is said of an entity, and what may be said."""

    text: str
    """The predicate, with `{}` for the value."""
    values: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Entities of one sort."""

    name: str
    count: int
    link: str
    """How a document names the entity of the next kind, with `{}` for it; empty for the last kind."""
    first: str
    """How a claim that starts here names the entity, with `{}` for its title."""
    later: str
    """How a claim speaks of it without its name, by the entity before."""
    pronoun: str
    properties: tuple[Property, ...]


@dataclass(frozen=True)
class Entity:
    """One document's subject."""

    kind: Kind
    title: str
    target: str
    """The title that its link leads to; empty for the last kind."""
    values: tuple[str, ...]
    """One for each of the kind's properties."""

    @property
    def text(self) -> str:
        """The document."""
        link = [self.kind.link.format(self.target)] if self.target else []
        first, *rest = [*link, *(self.says(place) for place in range(len(self.values)))]
        return " ".join([f"{self.title} {first}.", *(f"{self.kind.pronoun} {said}." for said in rest)])

    def says(self, place: int, value: str | None = None) -> str:
        """The predicate of one property, with another value if one is given."""
        return self.kind.properties[place].text.format(self.values[place] if value is None else value)


MONTHS = ("February", "March", "April", "May", "June", "September", "October", "November")
COUNTS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
KINDS = (
    Kind(
        "object",
        144,
        "is the work of {}",
        "The {}",
        "",
        "It",
        (
            Property(
                "was made of {}", ("bronze", "walnut", "pewter", "slate", "copper", "bone", "horn", "glass", "ash wood")
            ),
            Property("was finished in {}", tuple(str(year) for year in range(1402, 1720, 29))),
            Property(
                "is kept in a {}", ("mill", "chapel", "school", "granary", "tavern", "toll house", "barn", "tower")
            ),
        ),
    ),
    Kind(
        "maker",
        96,
        "was born in {}",
        "{}",
        "its maker",
        "They",
        (
            Property(
                "worked as a {}", ("glazier", "cooper", "saddler", "potter", "dyer", "locksmith", "carver", "tinsmith")
            ),
            Property("taught {} pupils", COUNTS),
            Property("wrote a book on {}", ("bees", "knots", "tides", "moss", "ink", "bread", "stars", "riddles")),
        ),
    ),
    Kind(
        "town",
        64,
        "lies on the {}",
        "The town of {}",
        "the town where that maker was born",
        "It",
        (
            Property("holds its fair in {}", MONTHS),
            Property("sells {}", ("salt", "wool", "honey", "rope", "candles", "tiles", "cheese", "linen")),
            Property("has {} gates", COUNTS),
        ),
    ),
    Kind(
        "river",
        32,
        "rises in the {}",
        "The {}",
        "the river on which that town lies",
        "It",
        (
            Property("is crossed by {} bridges", COUNTS),
            Property("is fished for {}", ("trout", "eels", "pike", "perch", "crayfish", "carp", "bream", "lampreys")),
            Property("floods in {}", MONTHS),
        ),
    ),
    Kind(
        "range",
        16,
        "",
        "The {}",
        "the range in which that river rises",
        "It",
        (
            Property("counts {} peaks", COUNTS),
            Property("is mined for {}", ("tin", "coal", "jade", "silver", "zinc", "chalk", "iron", "opal")),
            Property("is home to {}", ("lynxes", "wolves", "ibexes", "eagles", "bears", "martens", "owls", "boars")),
        ),
    ),
)
"""In the order of their links."""
TITLES = {"object": "{} {}", "maker": "{} {}", "town": "{}", "river": "River {}", "range": "{} Range"}
THINGS = ("Bell", "Lamp", "Loom", "Chest", "Clock", "Organ", "Globe", "Harp")
STARTS = (
    "bra",
    "dro",
    "fel",
    "gri",
    "hul",
    "jas",
    "kro",
    "lum",
    "mev",
    "nor",
    "pel",
    "quo",
    "ruv",
    "syl",
    "tav",
    "wex",
)
MIDDLES = ("ba", "de", "gi", "ko", "lu", "mi", "no", "pha", "ra", "shu", "ve", "zo")
ENDS = ("dak", "fen", "gral", "lith", "mok", "nash", "rin", "sk", "thar", "vane", "wick", "yx")


@cache
def entities() -> tuple[Entity, ...]:
    """All of the world, in the order of `KINDS`."""
    rng = random.Random(SEED)
    names = _names(rng)
    titles = {kind.name: [_title(kind, names, place) for place in range(kind.count)] for kind in KINDS}
    following = {kind.name: titles[after.name] for kind, after in pairwise(KINDS)}
    return tuple(
        Entity(
            kind,
            title,
            following[kind.name][place % len(following[kind.name])] if kind.link else "",
            tuple(rng.choice(one.values) for one in kind.properties),
        )
        for kind in KINDS
        for place, title in enumerate(titles[kind.name])
    )


@cache
def by_title() -> dict[str, Entity]:
    """Every entity under its title."""
    return {entity.title: entity for entity in entities()}


def chain(start: Entity, hops: int) -> tuple[Entity, ...]:
    """`hops` entities from `start` along their links."""
    found = [start]
    while len(found) < hops:
        found.append(by_title()[found[-1].target])
    return tuple(found)


def _names(rng: random.Random) -> Iterator[str]:
    """Invented words, each once."""
    words = [start + middle + end for start in STARTS for middle in MIDDLES for end in ENDS]
    rng.shuffle(words)
    return (word.capitalize() for word in words)


def _title(kind: Kind, names: Iterator[str], place: int) -> str:
    second = THINGS[place % len(THINGS)] if kind.name == "object" else next(names) if kind.name == "maker" else ""
    return TITLES[kind.name].format(next(names), second)
