"""Questions over the table, each with its answer and the names that must be looked up for it."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fst_optimizer.task_kit import distinct, split_by_hash

from .goods import Good, goods, makers


@dataclass(frozen=True)
class Question:
    """What is asked of the agent."""

    text: str
    answer: float
    names: tuple[str, ...]
    """Goods and makers that must be looked up."""


@dataclass(frozen=True)
class Template:
    """One form of question. `{0}` is the first good, `{n0}` its number of pieces."""

    text: str
    goods: int
    """How many of them it is about."""
    answer: Callable[[tuple[Good, ...], tuple[int, ...]], float]
    rebates: int = 0
    """Of how many of the goods, from the first on, the maker's rebate is needed too: a look-up more each."""


def share_paid(good: Good) -> float:
    """What is left of a price after the maker's rebate."""
    return 1 - makers()[good.maker].rebate / 100


TEMPLATES: dict[int, tuple[Template, ...]] = {
    1: (
        Template("What do {n0} pieces of the {0} cost, in coins?", 1, lambda g, n: n[0] * g[0].price),
        Template("What do {n0} pieces of the {0} weigh, in ounces?", 1, lambda g, n: n[0] * g[0].weight),
        Template(
            "{n0} pieces of the {0} are sold from stock. What are those that remain worth, in coins?",
            1,
            lambda g, n: (g[0].stock - n[0]) * g[0].price,
        ),
    ),
    2: (
        Template(
            "What do {n0} pieces of the {0} and {n1} pieces of the {1} cost together, in coins?",
            2,
            lambda g, n: n[0] * g[0].price + n[1] * g[1].price,
        ),
        Template(
            "How much heavier are {n0} pieces of the {0} than {n1} pieces of the {1}, in ounces? "
            "A negative number says that they are lighter.",
            2,
            lambda g, n: n[0] * g[0].weight - n[1] * g[1].weight,
        ),
        Template(
            "What do {n0} pieces of the {0} cost after its maker's rebate, in coins?",
            1,
            lambda g, n: n[0] * g[0].price * share_paid(g[0]),
            rebates=1,
        ),
    ),
    3: (
        Template(
            "What do {n0} pieces of the {0}, {n1} of the {1} and {n2} of the {2} weigh together, in ounces?",
            3,
            lambda g, n: sum(count * good.weight for count, good in zip(n, g, strict=True)),
        ),
        Template(
            "What does one piece cost on average, in coins, "
            "if {n0} pieces of the {0}, {n1} of the {1} and {n2} of the {2} are bought?",
            3,
            lambda g, n: sum(count * good.price for count, good in zip(n, g, strict=True)) / sum(n),
        ),
        Template(
            "What do {n0} pieces of the {0}, after its maker's rebate, and {n1} pieces of the {1}, "
            "at the full price, cost together, in coins?",
            2,
            lambda g, n: n[0] * g[0].price * share_paid(g[0]) + n[1] * g[1].price,
            rebates=1,
        ),
    ),
}
"""By the number of look-ups."""
PIECES = (2, 10)
"""Fewest and most pieces of one good; fewer than any stock."""


def split_of(chosen: tuple[Good, ...]) -> str:
    """The split that a set of goods belongs to, decided by its hash alone, so that no set is in two splits."""
    return split_by_hash("+".join(sorted(good.name for good in chosen)))


def draw_questions(split: str, count: int, lookups: int, seed: int) -> list[Question]:
    """Different questions over sets of goods of the split."""
    rng = random.Random(f"questions/{lookups}/{split}/{seed}")

    def draws() -> Iterator[tuple[str, Question]]:
        while True:
            template = rng.choice(TEMPLATES[lookups])
            chosen = tuple(rng.sample(goods(), template.goods))
            if split_of(chosen) == split:
                question = ask(template, chosen, tuple(rng.randint(*PIECES) for _ in chosen))
                yield question.text, question

    return distinct(draws(), count)


def ask(template: Template, chosen: tuple[Good, ...], pieces: tuple[int, ...]) -> Question:
    """The template's question about these goods, this many of each."""
    text = template.text.format(
        *(good.name for good in chosen), **{f"n{place}": count for place, count in enumerate(pieces)}
    )
    names = dict.fromkeys([*(good.name for good in chosen), *(good.maker for good in chosen[: template.rebates])])
    return Question(text, round(template.answer(chosen, pieces), 6), tuple(names))
