"""Star graphs as text: a centre, arms of one length, nodes named by random two-digit numbers. Pure functions."""

import itertools
import random
import re
from dataclasses import dataclass

Nodes = tuple[str, ...]
Edge = frozenset[str]

LABELS = tuple(str(number) for number in range(10, 100))


@dataclass(frozen=True)
class Puzzle:
    """One graph with the question asked of it."""

    graph: str
    """Its edges, shuffled, the ends of each in random order: `17-42, 33-17`."""
    start: str
    """The centre."""
    goal: str
    """The end of one arm."""
    path: Nodes
    """From start to goal, both included."""

    @property
    def key(self) -> str:
        """The same for every order in which the edges, and their ends, can be written."""
        edges = sorted("-".join(sorted(edge)) for edge in edges_of(self.graph))
        return f"{' '.join(edges)} {self.start} {self.goal}"


def draw(rng: random.Random, degree: int, length: int) -> Puzzle:
    """A star of `degree` arms of `length` edges, with labels, edge order and goal at random."""
    start, *labels = rng.sample(LABELS, degree * length + 1)
    arms = [(start, *labels[at : at + length]) for at in range(0, degree * length, length)]
    edges = [pair for arm in arms for pair in itertools.pairwise(arm)]
    rng.shuffle(edges)
    text = ", ".join("-".join(rng.sample(edge, 2)) for edge in edges)
    path = rng.choice(arms)
    return Puzzle(text, start, path[-1], path)


def edges_of(graph: str) -> frozenset[Edge]:
    """The edges of a graph's text: `17-42, 33-17` has {17, 42} and {17, 33}."""
    return frozenset(frozenset(edge.split("-")) for edge in graph.split(", "))


def nodes_in(text: object) -> Nodes:
    """The numbers of a text, in order, whatever stands between them: `17 -> 42`, `17-42` and `[17, 42]` are alike.

    A list of numbers is read as its text. Anything else has none.
    """
    if isinstance(text, list | tuple):
        text = str(text)
    return tuple(re.findall("[0-9]+", text)) if isinstance(text, str) else ()


def walked(nodes: Nodes, edges: frozenset[Edge]) -> int:
    """How many steps follow an edge to a node that is new on the walk: on `17-42, 42-33`, `17 42 33 42` has 2."""
    seen, steps = set(nodes[:1]), 0
    for step in itertools.pairwise(nodes):
        steps += frozenset(step) in edges and step[1] not in seen
        seen.add(step[1])
    return steps
