"""Parcels, rules over them, and the English sentences that name the rules. Pure functions, no imports of dspy.

A rule is a list of clauses that is read from the top: the first one whose words all hold decides, and where none does,
what is said of all others. Every sentence begins with its rank, so that their order in a text does not matter, and
some of them alone make a part of the rule.

No sentence has an answer's word in it: where the rule says `road`, the answer is `truck`.
"""

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

Parcel = tuple[str, ...]
"""A word each of size, colour, content, sender, town and weight."""

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": ("tiny", "small", "large", "huge"),
    "colour": ("red", "blue", "green", "white", "black", "brown"),
    "content": ("glass", "books", "fruit", "tools", "toys", "shoes"),
    "sender": ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo"),
    "town": ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Kyoto"),
    "weight": NUMBERS,
}
LIMITS = {
    "over3": ("over three kilos", range(4, 10)),
    "over6": ("over six kilos", range(7, 10)),
    "under4": ("under four kilos", range(1, 4)),
    "under7": ("under seven kilos", range(1, 7)),
}
"""What a rule may say of the weight, and the kilos that it then is."""


@dataclass(frozen=True)
class Stage:
    """A kind of predictor: what it reads and writes, and how rules speak of it."""

    name: str
    """Its attribute on the program, so its name in `named_predictors()`."""
    sources: tuple[str, ...]
    target: str
    answers: Mapping[str, str]
    """What is answered, by the word that rules have for it."""


SORT = Stage("sort", ("parcel",), "carrier", {"road": "truck", "sea": "ship", "rail": "train", "air": "plane"})
PACK = Stage(
    "pack",
    ("parcel", "carrier"),
    "case",
    {"wood": "crate", "cloth": "sack", "metal": "tin", "card": "box"},
)
STAGES = (SORT, PACK)

WORDS: dict[str, str] = {
    **{word: name for name, words in ATTRIBUTES.items() if name != "weight" for word in words},
    **dict.fromkeys(LIMITS, "weight"),
    **dict.fromkeys(SORT.answers, "carrier"),
}
"""What a condition may be, and the attribute that it speaks of. Only a second stage knows the carrier."""
ORDER = (*ATTRIBUTES, "carrier")
RANKS = ("First", "Second", "Third")


@dataclass(frozen=True)
class Clause:
    """One line of a rule: parcels of which all these words are true go this way."""

    words: tuple[str, ...]
    way: str


@dataclass(frozen=True)
class Rule:
    """What one predictor should do: clauses from the top, then what is done with all others."""

    clauses: tuple[Clause, ...]
    other: str

    @property
    def words(self) -> tuple[str, ...]:
        """All conditions, clause by clause."""
        return tuple(word for clause in self.clauses for word in clause.words)


Rules = tuple[Rule, ...]
"""A rule each for the first stages of a program."""

# --- Parcels ---------------------------------------------------------------------------------------------------------


def text_of(parcel: Parcel) -> str:
    """A parcel as programs read it: `small red parcel of glass from Anna to Oslo, seven kilos`."""
    size, colour, content, sender, town, weight = parcel
    return f"{size} {colour} parcel of {content} from {sender} to {town}, {weight} kilos"


def parcel_in(text: str) -> Parcel:
    """The parcel that `text_of` wrote."""
    known = [word for word in text.replace(",", "").split() if any(word in words for words in ATTRIBUTES.values())]
    return tuple(known)


def holds(word: str, parcel: tuple[str | None, ...], way: str | None = None) -> bool:
    """Whether a condition is true of a parcel that goes this way."""
    if word in LIMITS:
        return NUMBERS.index(str(parcel[-1])) + 1 in LIMITS[word][1]
    return word == way if WORDS[word] == "carrier" else word in parcel


def fired(rule: Rule, parcel: tuple[str | None, ...], way: str | None = None) -> int:
    """The place of the clause that decides; the number of clauses where none does."""
    found = (i for i, clause in enumerate(rule.clauses) if all(holds(word, parcel, way) for word in clause.words))
    return next(found, len(rule.clauses))


def ways(rule: Rule) -> tuple[str, ...]:
    """What each clause decides, and last what is done with all others."""
    return (*(clause.way for clause in rule.clauses), rule.other)


def applied(rules: Rules, parcel: Parcel) -> tuple[str, ...]:
    """The way of each stage, the later ones knowing those before."""
    taken: list[str] = []
    for rule in rules:
        taken.append(ways(rule)[fired(rule, parcel, taken[0] if taken else None)])
    return tuple(taken)


# --- Sentences -------------------------------------------------------------------------------------------------------


_JOINTS = {
    "size": "{} ",
    "colour": "{} ",
    "content": " of {}",
    "sender": " from {}",
    "town": " to {}",
    "weight": " {}",
    "carrier": " by {}",
}


def phrase(words: tuple[str, ...]) -> str:
    """What names the parcels of a clause: `large red parcels of glass from Anna to Oslo over six kilos by road`."""
    said = {WORDS[word]: LIMITS[word][0] if word in LIMITS else word for word in words}
    parts = {name: _JOINTS[name].format(word) for name, word in said.items()}
    before = "".join(parts.get(name, "") for name in ("size", "colour"))
    return f"{before}parcels{''.join(parts.get(name, '') for name in ORDER[2:])}"


def clause_sentence(rank: int, clause: Clause) -> str:
    """The sentence of one clause at its place."""
    return f"{RANKS[rank]}, use {clause.way} for {phrase(clause.words)}."


def sentences(rule: Rule) -> tuple[str, ...]:
    """The rule's sentences, each with its rank: `First, use road for red parcels. Otherwise, use sea.`."""
    named = (clause_sentence(rank, clause) for rank, clause in enumerate(rule.clauses))
    return (*named, f"Otherwise, use {rule.other}.")


# --- Spelling --------------------------------------------------------------------------------------------------------


def spelled(rules: Rules) -> str:
    """Rules as a variant's name: `red_road-glass_Oslo_sea-rail.over6_wood-card`."""
    lines = ([*("_".join((*clause.words, clause.way)) for clause in rule.clauses), rule.other] for rule in rules)
    return ".".join("-".join(line) for line in lines)


def read(text: str) -> Rules:
    """The rules that `spelled` wrote, or a person.

    Raises:
        ValueError: A word is unknown or out of place, or a clause can never decide.
    """
    parts = text.split(".")
    if len(parts) > len(STAGES):
        raise ValueError(f"{len(parts)} stages, at most {len(STAGES)}: {', '.join(stage.name for stage in STAGES)}")
    rules = tuple(_read_rule(part, stage) for part, stage in zip(parts, STAGES, strict=False))
    decided = {outcome for outcome, _ in cells(rules)}
    for place, (stage, rule) in enumerate(zip(STAGES, rules, strict=False)):
        for i, line in enumerate(parts[place].split("-")):
            if i not in {outcome[place] for outcome in decided}:
                what = "what is left for all others" if i == len(rule.clauses) else "this clause"
                raise ValueError(f"{line!r} of {stage.name}: {what} never decides; no parcel gets there")
    return rules


def _read_rule(text: str, stage: Stage) -> Rule:
    *lines, other = text.split("-")
    if not 1 <= len(lines) <= len(RANKS):
        raise ValueError(f"{text!r} of {stage.name} has {len(lines)} clauses; give 1 to {len(RANKS)} and then the rest")
    clauses = []
    for line in lines:
        *words, way = line.split("_")
        known = [word for word, attribute in WORDS.items() if stage is not SORT or attribute != "carrier"]
        for word in words:
            if word not in known:
                raise ValueError(
                    f"unknown condition {word!r} in {line!r} of {stage.name}; choose one of {', '.join(known)}"
                )
        if not words or len({WORDS[word] for word in words}) < len(words):
            raise ValueError(f"{line!r} of {stage.name}: give conditions on different attributes and then one answer")
        clauses.append(Clause(tuple(sorted(words, key=lambda word: ORDER.index(WORDS[word]))), way))
    rule = Rule(tuple(clauses), other)
    for way in ways(rule):
        if way not in stage.answers:
            raise ValueError(f"unknown answer {way!r} of {stage.name}; choose one of {', '.join(stage.answers)}")
    return rule


# --- Parcels for rules -----------------------------------------------------------------------------------------------


Cell = tuple[tuple[str | None, ...], ...]
"""Parcels with None for the attributes that no rule speaks of."""


@lru_cache(maxsize=64)
def cells(rules: Rules) -> tuple[tuple[tuple[int, ...], tuple[Cell, ...]], ...]:
    """All kinds of parcels by the clauses that decide in each stage, and within these by which conditions hold."""
    named = {WORDS[word] for rule in rules for word in rule.words}
    found: dict[tuple[int, ...], dict[tuple[bool, ...], list[tuple[str | None, ...]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for parcel in itertools.product(*(words if name in named else (None,) for name, words in ATTRIBUTES.items())):
        taken: list[str] = []
        outcome, truth = [], []
        for rule in rules:
            way = taken[0] if taken else None
            truth += [holds(word, parcel, way) for word in rule.words]
            outcome.append(fired(rule, parcel, way))
            taken.append(ways(rule)[outcome[-1]])
        found[tuple(outcome)][tuple(truth)].append(parcel)
    return tuple((outcome, tuple(map(tuple, found[outcome].values()))) for outcome in sorted(found))


def draw_parcel(rng: random.Random, rules: Rules) -> Parcel:
    """A parcel such that every clause decides about as often, also where another one's conditions hold as well.

    Drawn evenly, a clause of two conditions would decide once in 36 parcels, and answering always the same would do.
    """
    kind = rng.choice(rng.choice(rng.choice(cells(rules))[1]))
    return tuple(word or rng.choice(words) for word, words in zip(kind, ATTRIBUTES.values(), strict=True))


def best_constant(rules: Rules) -> float:
    """What the best answers that never change would score on parcels as drawn: the mean over the stages."""
    outcomes = [outcome for outcome, _ in cells(rules)]
    total = 0.0
    for place, rule in enumerate(rules):
        taken = [ways(rule)[outcome[place]] for outcome in outcomes]
        total += max(map(taken.count, taken)) / len(taken)
    return total / len(rules)


# --- Drawing rules ---------------------------------------------------------------------------------------------------


def part_of(one: str, other: str) -> str:
    """Whether two conditions may meet in a rule of pretraining (`trained`), or only of `dev` or of `proof`.

    The pair's hash decides: three quarters are trained, an eighth each is withheld for tuning and for the tables.
    """
    digest = hashlib.sha256(" ".join(sorted((one, other))).encode()).digest()[0] % 8
    return {0: "proof", 4: "dev"}.get(digest, "trained")


def parts(rule: Rule) -> set[str]:
    """The parts of all pairs of conditions in a rule."""
    return {part_of(one, other) for one, other in itertools.combinations(rule.words, 2)}


def draw_rule(rng: random.Random, stage: Stage, clauses: int, both: float) -> Rule:
    """A rule of any part, with different answers; each clause has two conditions with probability `both`."""
    known = [word for word, attribute in WORDS.items() if stage is not SORT or attribute != "carrier"]
    *taken, other = rng.sample(list(stage.answers), clauses + 1)
    lines = []
    for way in taken:
        words = rng.sample(known, 2 if rng.random() < both else 1)
        while len({WORDS[word] for word in words}) < len(words):
            words = rng.sample(known, 2)
        lines.append(Clause(tuple(sorted(words, key=lambda word: ORDER.index(WORDS[word]))), way))
    return Rule(tuple(lines), other)


def is_trained(rule: Rule) -> bool:
    """Whether pretraining may use the rule: no pair of its conditions is withheld."""
    return parts(rule) <= {"trained"}


def draw_trained(rng: random.Random, stage: Stage, clauses: int, both: float) -> Rule:
    """A rule that pretraining may use."""
    while not is_trained(rule := draw_rule(rng, stage, clauses, both)):
        pass
    return rule


def draw_program(rng: random.Random, shape: tuple[int, ...], both: float, fits: Callable[[Rule], bool]) -> Rules:
    """Rules of so many clauses for the first stages, each one that fits, and no clause that never decides."""
    while True:
        drawn = []
        for stage, clauses in zip(STAGES, shape, strict=False):
            while not fits(rule := draw_rule(rng, stage, clauses, both)):
                pass
            drawn.append(rule)
        with suppress(ValueError):
            return read(spelled(tuple(drawn)))


SHAPES = ((2, 3), (3, 2), (2, 2), (3, 3), (3, 2))
"""How many clauses the stages of the withheld programs have."""
BOTH = 0.3
"""How often a clause of theirs has two conditions."""
MOST_CONSTANT = 0.45


def withheld_programs(part: str, seed: int) -> tuple[str, ...]:
    """Programs, spelled, of which every stage has a pair of conditions of this part, and none of the other part's.

    Answers that never change score at most 0.45 on them.
    """
    rng, found = random.Random(f"parcels/{part}/{seed}"), []

    def fits(rule: Rule) -> bool:
        return part in parts(rule) <= {part, "trained"}

    for shape in SHAPES:
        while best_constant(drawn := draw_program(rng, shape, BOTH, fits)) > MOST_CONSTANT:
            pass
        found.append(spelled(drawn))
    return tuple(found)
