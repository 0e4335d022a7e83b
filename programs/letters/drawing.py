"""Draws the tasks that methods are developed on, and those that they are compared on: `DEV` and `PROOF` in `rules.py`.

`python -m programs.letters.drawing` prints both.
"""

import random
from functools import cache
from itertools import permutations, product

from .rules import ALPHABET, LENGTHS, OPERATIONS, PUBLISHED, WITHHELD, Rule, action, apply, lengths_for, share, shortest

SEED = 14
LISTS, NEAR = 24, 3
"""On how many lists rules are compared; those that agree on more than one in `NEAR` are near to each other."""

EXAMPLES = {("dedupe", "sort"), ("reverse", "drop_first")}
"""Pairs that were not published, but that the manual's and the tests' examples run."""


@cache
def answered(rule: Rule) -> tuple[str, ...]:
    """What a rule answers on lists of 5 to 8 letters, always the same ones."""
    rng = random.Random("letters/samples")
    lists = [rng.choices(ALPHABET, k=rng.randint(*LENGTHS[0])) for _ in range(LISTS)]
    return tuple("".join(apply(rule, letters)) for letters in lists)


def near(one: Rule, other: Rule) -> bool:
    """Whether two rules answer the same on more than a third of the lists."""
    return NEAR * sum(map(str.__eq__, answered(one), answered(other))) > LISTS


def needed(rule: Rule) -> bool:
    """Whether no rule with fewer operations comes near to it, and its lists have the usual lengths."""
    fewer = [one for count in range(1, len(rule)) for one in product(OPERATIONS, repeat=count)]
    return lengths_for([rule]) == LENGTHS[0] and not any(near(one, rule) for one in fewer)


def triples(use: str) -> list[Rule]:
    """The rules of three operations that are for `dev` or `proof`, in order, one for each action.

    Their operations differ, no two in a row are a pair that is withheld for itself, and no shorter rule acts like them.
    """
    found: dict[tuple[str, ...], Rule] = {}
    for rule in permutations(OPERATIONS, 3):
        apart = rule[:2] not in WITHHELD and rule[1:] not in WITHHELD
        if apart and action(rule) not in shortest(2) and share(rule) == use:
            found.setdefault(action(rule), rule)
    return list(found.values())


def draw(use: str, seed: int = SEED) -> tuple[str, ...]:
    """Five rules for `dev` or `proof`, each of a program with one predictor: three withheld pairs, then two triples.

    The pairs for `dev` were published, those for `proof` were not, and no example runs them. Every rule is `needed`.

    One predictor, since on a chain under one seed instruction RL does with every predictor what it finds first, and
    stays there: a lead over it would be the trap's, not the method's.
    """
    rng = random.Random(f"letters/{use}/{seed}")
    known = PUBLISHED if use == "dev" else set(WITHHELD) - set(PUBLISHED) - EXAMPLES
    pairs = [pair for pair in WITHHELD if pair in known and needed(pair)]
    threes = triples(use)
    chosen = rng.sample(pairs, 3)
    while len(chosen) < 5:
        if needed(rule := rng.choice(threes)) and rule not in chosen:
            chosen.append(rule)
    return tuple("-".join(rule) for rule in chosen)


if __name__ == "__main__":
    print(draw("dev"), draw("proof"), sep="\n")  # noqa: T201
