"""Rules over lists of letters, and the English sentences that name them. Pure functions, no imports of dspy.

A rule is a tuple of one or more operation names, applied from left to right: `("sort", "rotate")` sorts, then rotates.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from functools import cache
from itertools import permutations, product

Letters = list[str]
Rule = tuple[str, ...]

ALPHABET = "abcdefghij"


def copy(letters: Letters) -> Letters:
    """The same letters: `a c b` -> `a c b`."""
    return list(letters)


def reverse(letters: Letters) -> Letters:
    """Last to first: `a c b` -> `b c a`."""
    return letters[::-1]


def sort(letters: Letters) -> Letters:
    """Alphabetical order: `a c b` -> `a b c`."""
    return sorted(letters)


def rotate(letters: Letters) -> Letters:
    """The first letter goes to the end: `a c b` -> `c b a`."""
    return letters[1:] + letters[:1]


def double(letters: Letters) -> Letters:
    """Each letter twice: `a c` -> `a a c c`."""
    return [letter for letter in letters for _ in range(2)]


def drop_first(letters: Letters) -> Letters:
    """All but the first: `a c b` -> `c b`."""
    return letters[1:]


def drop_last(letters: Letters) -> Letters:
    """All but the last: `a c b` -> `a c`."""
    return letters[:-1]


def keep_odd(letters: Letters) -> Letters:
    """The first, third, fifth...: `a c b d` -> `a b`."""
    return letters[::2]


def dedupe(letters: Letters) -> Letters:
    """The first of each letter: `a c a b` -> `a c b`."""
    return list(dict.fromkeys(letters))


def swap_ends(letters: Letters) -> Letters:
    """The first and the last letter trade places: `a c b` -> `b c a`."""
    return letters[-1:] + letters[1:-1] + letters[:1] if len(letters) > 1 else list(letters)


def rotate_right(letters: Letters) -> Letters:
    """The last letter goes to the front: `a c b` -> `b a c`."""
    return letters[-1:] + letters[:-1]


def sort_down(letters: Letters) -> Letters:
    """Backwards alphabetical order: `a c b` -> `c b a`."""
    return sorted(letters, reverse=True)


def keep_even(letters: Letters) -> Letters:
    """The second, fourth...: `a c b d` -> `c d`."""
    return letters[1::2]


def swap_start(letters: Letters) -> Letters:
    """The first two letters trade places: `a c b` -> `c a b`."""
    return letters[1:2] + letters[:1] + letters[2:]


def double_first(letters: Letters) -> Letters:
    """The first letter twice: `a c b` -> `a a c b`."""
    return letters[:1] + letters


def double_last(letters: Letters) -> Letters:
    """The last letter twice: `a c b` -> `a c b b`."""
    return letters + letters[-1:]


OPERATIONS: dict[str, Callable[[Letters], Letters]] = {
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "rotate": rotate,
    "double": double,
    "drop_first": drop_first,
    "drop_last": drop_last,
    "keep_odd": keep_odd,
    "dedupe": dedupe,
    "swap_ends": swap_ends,
    "rotate_right": rotate_right,
    "sort_down": sort_down,
    "keep_even": keep_even,
    "swap_start": swap_start,
    "double_first": double_first,
    "double_last": double_last,
}

PHRASES: dict[str, tuple[str, ...]] = {
    "copy": ("copy the letters", "write the letters unchanged", "give the letters back as they are"),
    "reverse": ("reverse the letters", "write the letters backwards", "turn the order of the letters around"),
    "sort": ("sort the letters", "put the letters in alphabetical order", "order the letters alphabetically"),
    "rotate": ("move the first letter to the end", "rotate the letters left by one", "put the first letter last"),
    "double": ("write each letter twice", "double every letter", "repeat each letter once more"),
    "drop_first": ("drop the first letter", "remove the first letter", "leave out the first letter"),
    "drop_last": ("drop the last letter", "remove the last letter", "leave out the last letter"),
    "keep_odd": (
        "keep every second letter, starting with the first",
        "keep only the letters at odd places",
        "take the first letter and every other one after it",
    ),
    "dedupe": ("keep only the first of each letter", "remove repeated letters", "drop letters that came before"),
    "swap_ends": (
        "swap the first and the last letter",
        "exchange the two end letters",
        "let the first and last letters trade places",
    ),
    "rotate_right": (
        "move the last letter to the front",
        "rotate the letters right by one",
        "put the last letter first",
    ),
    "sort_down": (
        "sort the letters backwards",
        "put the letters in backwards alphabetical order",
        "order the letters from the last in the alphabet to the first",
    ),
    "keep_even": (
        "keep every second letter, starting with the second",
        "keep only the letters at even places",
        "leave out the first letter and every other one after it",
    ),
    "swap_start": (
        "swap the first two letters",
        "exchange the first and the second letter",
        "let the first two letters trade places",
    ),
    "double_first": ("write the first letter twice", "double the first letter", "repeat the first letter once more"),
    "double_last": ("write the last letter twice", "double the last letter", "repeat the last letter once more"),
}
"""What names an operation: the canonical phrase first, then paraphrases."""

CHAINS = ("{0}, then {1}.", "first {0}, then {1}.", "{0} and then {1}.", "{0}. Then {1}.")
"""What names a pair: the canonical pattern first, then paraphrases."""

WITHHELD: tuple[Rule, ...] = (
    ("sort", "rotate"),
    ("reverse", "rotate"),
    ("reverse", "drop_first"),
    ("dedupe", "sort"),
    ("keep_odd", "double"),
    ("swap_ends", "drop_last"),
    ("drop_first", "sort"),
    ("dedupe", "reverse"),
    ("rotate", "double"),
    ("swap_ends", "rotate"),
)
"""The pairs kept for the tasks: pretraining uses neither these nor any pair that acts like one of them."""

PUBLISHED: tuple[Rule, ...] = (
    ("sort", "rotate"),
    ("swap_ends", "rotate"),
    ("drop_first", "sort"),
    ("swap_ends", "drop_last"),
    ("rotate", "double"),
)
"""The withheld pairs that comparisons were published on before `PROOF` was drawn: they are for development."""

DEV: tuple[str, ...] = (
    "drop_first-sort",
    "swap_ends-drop_last",
    "swap_ends-rotate",
    "sort_down-double_first-rotate_right",
    "double-sort_down-drop_last",
    "sort-rotate",
    "drop_first-rotate_right-double_last",
    "rotate_right-keep_odd-sort",
    "rotate.drop_first-sort",
    "dedupe.swap_ends-drop_last",
)
"""Tasks to build, sweep and tune on: `drawing.draw("dev")`, then others, chains last."""

PROOF: tuple[str, ...] = (
    "dedupe-reverse",
    "keep_odd-double",
    "reverse-rotate",
    "sort-keep_odd-rotate_right",
    "rotate_right-swap_ends-double_last",
)
"""Tasks for the final table and for nothing else: `drawing.draw("proof")`. Nothing is tuned on them."""

LENGTHS = ((5, 8), (6, 9), (4, 7), (3, 6), (2, 5), (2, 4))
"""Fewest and most letters, the first that suit a rule that is spelled."""
READ, WRITTEN = (2, 9), (1, 18)
"""Fewest and most letters that a predictor may be given and may have to answer: pretraining knows no others."""

PROBES: tuple[Letters, ...] = tuple(list(text) for text in ("fcajb", "hbdbaec", "gaagcif", "jjdce", "bdiajgc", "ca"))
"""Lists on which rules that differ also answer differently."""


def apply(rule: Rule, letters: Letters) -> Letters:
    """The rule's answer: its operations from left to right."""
    for name in rule:
        letters = OPERATIONS[name](letters)
    return letters


@cache
def action(rule: Rule) -> tuple[str, ...]:
    """What a rule answers on every probe list."""
    return tuple("".join(apply(rule, probe)) for probe in PROBES)


def alike(one: Rule, other: Rule) -> bool:
    """Whether two rules answer the same on every probe list, as `reverse, drop_first` and `drop_last, reverse` do."""
    return action(one) == action(other)


@cache
def shortest(operations: int) -> frozenset[tuple[str, ...]]:
    """The actions of all rules of at most that many operations."""
    rules = (rule for count in range(1, operations + 1) for rule in product(OPERATIONS, repeat=count))
    return frozenset(map(action, rules))


def withheld(rule: Rule) -> bool:
    """Whether the rule is kept for the tasks: neither the model nor a reflector may be trained on it.

    These are the pairs of `WITHHELD`, a quarter of all rules of three operations that no shorter rule acts like, and
    whatever acts like one of them.
    """
    if any(alike(rule, pair) for pair in WITHHELD):
        return True
    return action(rule) not in shortest(2) and share(rule) in ("dev", "proof")


def share(rule: Rule) -> str:
    """What a rule of three operations is for, by its action's hash: `dev` or `proof`, an eighth each, or `training`."""
    digest = hashlib.sha256(" ".join(action(rule)).encode()).digest()
    return {0: "dev", 1: "proof"}.get(digest[0] % 8, "training")


def sentence(rule: Rule, phrases: tuple[int, ...] | None = None, chain: int = 0) -> str:
    """What names a rule, one sentence or, for three operations, three; the canonical words unless told otherwise.

    Args:
        rule: One to three operation names.
        phrases: For each operation, which of its phrases to use. None: the canonical ones.
        chain: Which of the patterns joins two operations.
    """
    words = [PHRASES[name][which] for name, which in zip(rule, phrases or (0,) * len(rule), strict=True)]
    if len(words) != 2:
        return " ".join(f"{text[0].upper()}{text[1:]}." for text in words)
    text = CHAINS[chain].format(*words)
    return text[0].upper() + text[1:]


def random_sentence(rng: random.Random) -> str:
    """What names some rule, withheld or not: of one operation or two, 40% each, or of three."""
    count = rng.choices((1, 2, 3), (2, 2, 1))[0]
    return sentence(tuple(rng.sample(list(OPERATIONS), count)))


def trained_pairs() -> tuple[Rule, ...]:
    """The pairs that pretraining may use: no withheld one, none that acts like a withheld one or a single operation."""
    singles = tuple((name,) for name in OPERATIONS)
    pairs: tuple[Rule, ...] = tuple(permutations(OPERATIONS, 2))
    return tuple(pair for pair in pairs if not any(alike(pair, known) for known in (*singles, *WITHHELD)))


# --- Lengths ---------------------------------------------------------------------------------------------------------


def suits(stages: Iterable[Rule], letters: Letters) -> bool:
    """Whether no stage gets or makes a list of a length that the model has never seen, least of all an empty one."""
    for rule in stages:
        made = apply(rule, letters)
        if not (READ[0] <= len(letters) <= READ[1] and WRITTEN[0] <= len(made) <= WRITTEN[1]):
            return False
        letters = made
    return True


def lengths_for(stages: Iterable[Rule]) -> tuple[int, int] | None:
    """The first of `LENGTHS` that suit a program of these stages; None where none do."""
    stages = tuple(stages)
    fitting = (pair for pair in LENGTHS if all(suits(stages, list(ALPHABET[:length])) for length in pair))
    return next(fitting, None)
