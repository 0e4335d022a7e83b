"""Chains families into programs: one function `main` over one, two or three stages, and arguments for it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .execute import OutOfBounds, run
from .families import FAMILIES, Family
from .naming import new_values


@dataclass(frozen=True)
class Level:
    """How hard programs are."""

    stages: int
    """Calls that `main` makes one after the other. One: `main` is the function itself."""
    sizes: tuple[int, int]
    """Fewest and most elements of a list argument; texts have about twice as many letters."""
    controls: int
    """Stages that are a loop over one function, or a choice between two, instead of a plain call; at most."""
    states: tuple[int, int]
    """Fewest and most different values that a run may make on the way, those that the prompt shows not counted."""
    output: int
    """Most characters of the output as JSON."""


LEVELS = {
    "easy": Level(1, (3, 5), 0, (2, 12), 60),
    "medium": Level(2, (4, 7), 1, (4, 24), 100),
    "hard": Level(3, (5, 9), 2, (8, 48), 140),
}

PARAMETERS = {
    "ints": ("xs", "nums", "items"),
    "number": ("n", "m", "num"),
    "text": ("s", "text", "line"),
    "words": ("words", "names", "ws"),
    "table": ("table", "stock", "counts"),
}
CONDITIONS = {
    "ints": ("len({v}) > k", "sum({v}) % 2 == 0"),
    "number": ("{v} % 3 == 1", "{v} > k * 5"),
    "text": ("len({v}) % 2 == 0", "len({v}) > k * 3"),
    "words": ("len({v}) > k", "len({v}) % 2 == 1"),
    "table": ("len({v}) > k", "len({v}) % 2 == 0"),
}
FUNCTION_NAMES = ("f", "g", "h", "p", "q", "r")
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve")


@dataclass(frozen=True)
class Program:
    """Source and arguments."""

    code: str
    arguments: dict[str, Any]
    families: tuple[str, ...]
    """Those that its functions come from."""


# --- Arguments -------------------------------------------------------------------------------------------------------


def _ints(rng: Random, size: int) -> list[int]:
    return [rng.randint(-6, 20) for _ in range(size)]


def _number(rng: Random, size: int) -> int:
    return rng.randint(8, 30 * size)


def _text(rng: Random, size: int) -> str:
    letters = rng.sample("abcdefgh", 4)
    return "".join(rng.choice(letters) * rng.choice((1, 1, 2)) for _ in range(size + 2))


def _word(rng: Random) -> str:
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 2)))
    return word[rng.randint(0, 1) :] + rng.choice(("", "n", "s"))


def _words(rng: Random, size: int) -> list[str]:
    return [_word(rng) for _ in range(size)]


def _table(rng: Random, size: int) -> dict[str, int]:
    return {_word(rng): rng.randint(0, 20) for _ in range(size)}


DRAW: dict[str, Callable[[Random, int], Any]] = {
    "ints": _ints,
    "number": _number,
    "text": _text,
    "words": _words,
    "table": _table,
}
"""Type -> (source of randomness, size) -> a value of it."""


# --- Programs --------------------------------------------------------------------------------------------------------


def draw(rng: Random, level: Level) -> Program:
    """One program with arguments. It may still turn out dull or out of bounds: `solve` tells."""
    chain = _chain(rng, level.stages)
    source = chain[0].source
    parameter = rng.choice(PARAMETERS[source])
    argument = DRAW[source](rng, rng.randint(*level.sizes))
    if level.stages == 1:
        return Program(chain[0].write(rng, "main", parameter), {parameter: argument}, (chain[0].name,))
    functions, body, families = _stages(rng, chain, parameter, level.controls)
    arguments, k = {parameter: argument}, rng.randint(2, 3)
    if _K.search("\n".join(body)) and rng.random() < 0.6:
        arguments["k"] = k
    else:
        body = [_K.sub(str(k), line) for line in body]
    main = "\n".join([f"def main({', '.join(arguments)}):", *body])
    return Program("\n\n".join([*functions, main]), arguments, families)


_K = re.compile(r"\bk\b")


def _chain(rng: Random, stages: int) -> list[Family]:
    """Families of which each takes what the one before it returns."""
    chain = [rng.choice([one for one in FAMILIES.values() if stages == 1 or one.target != "real"])]
    while len(chain) < stages:
        last = len(chain) == stages - 1
        fitting = [one for one in FAMILIES.values() if one.source == chain[-1].target]
        chain.append(rng.choice([one for one in fitting if last or one.target != "real"]))
    return chain


def _stages(
    rng: Random, chain: list[Family], value: str, controls: int
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """The functions, the lines of `main`'s body, where a small number is called `k`, and the families used."""
    names = iter(FUNCTION_NAMES)
    functions: list[str] = []
    used: list[str] = []

    def add(family: Family) -> str:
        name = next(names)
        functions.append(family.write(rng, name, rng.choice(PARAMETERS[family.source])))
        used.append(family.name)
        return name

    body: list[str] = []
    controlled = rng.sample(range(len(chain)), rng.randint(0, controls))
    for at, family in enumerate(chain):
        new, f = "abc"[at], add(family)
        if at not in controlled:
            body.append(f"    {new} = {f}({value})")
        elif family.source == family.target and rng.random() < 0.7:
            body += [f"    {new} = {value}", "    for _ in range(k):", f"        {new} = {f}({new})"]
        else:
            alike = [one for one in FAMILIES.values() if (one.source, one.target) == (family.source, family.target)]
            g = add(rng.choice(alike))
            condition = rng.choice(CONDITIONS[family.source]).format(v=value)
            body += [f"    if {condition}:", f"        {new} = {f}({value})"]
            body += ["    else:", f"        {new} = {g}({value})"]
        value = new
    return functions, [*body, f"    return {value}"], tuple(used)


@dataclass(frozen=True)
class Solved:
    """What a program returns, and what it makes on the way."""

    output: Any
    states: tuple[str, ...]
    """The different values of the run, in order of appearance, as JSON, without those that the prompt shows."""


def solve(program: Program, level: Level) -> Solved | None:
    """Runs it; None where the run is out of the level's bounds, or so dull that the output could be guessed."""
    try:
        done = run(program.code, program.arguments)
    except OutOfBounds:
        return None
    if not done.output or done.output in program.arguments.values() or len(json.dumps(done.output)) > level.output:
        return None
    states = new_values(done.noted, f"{program.code}\n{json.dumps(program.arguments)}")
    fewest, most = level.states
    return Solved(done.output, states) if fewest <= len(states) <= most else None
