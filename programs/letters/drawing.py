"""Draws the tasks that methods are developed on, and those that they are compared on: `DEV` and `PROOF` in `rules.py`.

`python -m programs.letters.drawing` prints both.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product

from .rules import ALPHABET, LENGTHS, OPERATIONS, PUBLISHED, WITHHELD, Rule, action, apply, lengths_for, share, shortest

SEED = 14
LISTS, NEAR = 24, 3
"""On how many lists rules are compared; those that agree on more than one in `NEAR` are near to each other."""
LEAST = 4
"""Fewest letters that the second predictor works on, where the first got 5."""


@cache
def answered(rule: Rule) -> tuple[str, ...]:
    """What a rule answers on lists of 5 to 8 letters, always the same ones."""
    rng = random.Random("letters/samples")
    lists = [rng.choices(ALPHABET, k=rng.randint(*LENGTHS[0])) for _ in range(LISTS)]
    return tuple("".join(apply(rule, letters)) for letters in lists)


def near(one: Rule, other: Rule) -> bool:
    """Whether two rules answer the same on more than a third of the lists."""
    return NEAR * sum(map(str.__eq__, answered(one), answered(other))) > LISTS


def needed(first: str, second: Rule) -> bool:
    """Whether nothing simpler comes near to what a program of these two stages does.

    No rule with fewer operations than both have together does, and after the first stage no rule with fewer operations
    than the second has: the one neither undoes the other nor makes it trivial.
    """
    whole = (first, *second)
    fewer = [rule for count in range(1, len(whole)) for rule in product(OPERATIONS, repeat=count)]
    after = [(first, *rule) for rule in fewer if len(rule) < len(second)]
    left = len(apply((first,), list(ALPHABET[: LENGTHS[0][0]])))
    suiting = lengths_for([(first,), second]) == LENGTHS[0] and left >= LEAST
    return suiting and not any(near(rule, whole) for rule in (*fewer, *after))


def triples(use: str) -> list[Rule]:
    """The rules of three operations that are for `dev` or `proof`, in order, one for each action.

    Their operations differ, no two in a row are a pair that is withheld for itself, no shorter rule acts like them, and
    none that leaves out an operation comes near.
    """
    found: dict[tuple[str, ...], Rule] = {}
    for rule in permutations(OPERATIONS, 3):
        parts = (rule[:i] + rule[i + 1 :] for i in range(3))
        apart = rule[:2] not in WITHHELD and rule[1:] not in WITHHELD and not any(near(part, rule) for part in parts)
        if apart and action(rule) not in shortest(2) and share(rule) == use:
            found.setdefault(action(rule), rule)
    return list(found.values())


def draw(use: str, seed: int = SEED) -> tuple[str, ...]:
    """Five programs of two predictors for `dev` or `proof`: a single operation, then a rule that is withheld.

    Three have a withheld pair, for `dev` one that was published and for `proof` one that was not, and two a rule of
    three operations. No first operation and no second rule is there twice, and every program is `needed`.
    """
    rng = random.Random(f"letters/{use}/{seed}")
    tasks: dict[str, str] = {}

    def add(seconds: Sequence[Rule], count: int) -> None:
        for second in rng.sample(seconds, len(seconds)):
            firsts = [name for name in OPERATIONS if name not in tasks and needed(name, second)]
            if firsts and count:
                first = rng.choice(firsts)
                tasks[first] = f"{first}.{'-'.join(second)}"
                count -= 1

    add([pair for pair in WITHHELD if (pair in PUBLISHED) == (use == "dev")], 3)
    add(rng.sample(triples(use), 12), 2)
    return tuple(tasks.values())


if __name__ == "__main__":
    print(draw("dev"), draw("proof"), sep="\n")  # noqa: T201
