"""Star graphs: find the way from the centre to the end of one arm, among edges in random order.

All arms look alike at the centre, so the first step cannot be guessed: the way is found from the goal. A variant
names degree and length (`d5-l5`), then perhaps `-two` (a program of two predictors), then perhaps `-exact` (the
score is all or nothing).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import by_predictor, checked_size, distinct, numbered, split_by_hash

from .graph import LABELS, Nodes, Puzzle, draw, edges_of, nodes_in, walked

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SEED_INSTRUCTIONS = {
    "find": "Find the path from the start to the goal.",
    "plan": "Plan the path from the start to the goal.",
    "answer": "Give the path from the start to the goal.",
}
MAX_TOKENS = 768
"""Of one answer. Tracing an arm of five edges takes about a hundred tokens; room is left for going over the edges."""
SIZES = {"train": 512, "val": 256, "test": 512}
LARGEST_SIZE = 4096

DEFAULT_VARIANT = "d5-l5"
MOST = 20
"""The largest degree, and the largest length."""
ALLOWED = (
    f"degree and length from 2 to {MOST}, at most {len(LABELS) - 1} nodes besides the centre, "
    "then perhaps -two, then perhaps -exact: d2-l5, d5-l5-two, d10-l5-exact"
)

WALK_SHARE, PLACE_SHARE = 0.1, 0.3
"""What a wrong path earns at most: for steps along edges, and for inner nodes at their places."""


@dataclass(frozen=True)
class Variant:
    """One task: the shape of its graphs, the program, and how it is scored."""

    degree: int
    """Arms of a star."""
    length: int
    """Edges of an arm."""
    two: bool
    """Whether a predictor plans and another answers, or one does it all."""
    exact: bool
    """Whether anything but the right path scores 0."""


def variant_named(variant: str | None) -> Variant:
    """The variant of that name, the default one for None. Raises ValueError for a name that is none."""
    name = DEFAULT_VARIANT if variant is None else variant
    match = re.fullmatch(r"d([0-9]{1,3})-l([0-9]{1,3})(-two)?(-exact)?", name)
    if match is None:
        raise ValueError(f"unknown variant {name!r} of star_graph; give d for degree and l for length: {ALLOWED}")
    degree, length = int(match[1]), int(match[2])
    if not (2 <= degree <= MOST and 2 <= length <= MOST and degree * length < len(LABELS)):
        raise ValueError(f"variant {name!r} of star_graph is out of range; give {ALLOWED}")
    return Variant(degree, length, match[3] is not None, match[4] is not None)


# --- Programs --------------------------------------------------------------------------------------------------------


class FindPath(dspy.Module):  # type: ignore[misc]
    """One predictor that reasons and answers."""

    def __init__(self) -> None:
        """Builds it with the seed instruction."""
        super().__init__()
        signature = dspy.Signature("graph, start, goal -> path", SEED_INSTRUCTIONS["find"])
        self.find = dspy.ChainOfThought(signature, max_tokens=MAX_TOKENS)

    def forward(self, graph: str, start: str, goal: str) -> dspy.Prediction:
        """Asks once."""
        return self.find(graph=graph, start=start, goal=goal)


class PlanThenAnswer(dspy.Module):  # type: ignore[misc]
    """A predictor that plans, and one that answers with the plan before it."""

    def __init__(self) -> None:
        """Builds both with their seed instructions."""
        super().__init__()
        plan = dspy.Signature("graph, start, goal -> plan", SEED_INSTRUCTIONS["plan"])
        answer = dspy.Signature("graph, start, goal, plan -> path", SEED_INSTRUCTIONS["answer"])
        self.plan = dspy.Predict(plan, max_tokens=MAX_TOKENS)
        self.answer = dspy.Predict(answer, max_tokens=MAX_TOKENS)

    def forward(self, graph: str, start: str, goal: str) -> dspy.Prediction:
        """Plans, then answers; the prediction carries the plan, so that the metric can grade it."""
        plan = self.plan(graph=graph, start=start, goal=goal).plan
        path = self.answer(graph=graph, start=start, goal=goal, plan=plan).path
        return dspy.Prediction(plan=plan, path=path)


def build_program(variant: str | None = None) -> dspy.Module:
    """The seed program of a variant: general instructions, no LM attached."""
    return PlanThenAnswer() if variant_named(variant).two else FindPath()


# --- Data ------------------------------------------------------------------------------------------------------------


def split_of(puzzle: Puzzle) -> str:
    """The split that a puzzle belongs to, decided by the hash of graph and goal, whatever order the edges are in."""
    return split_by_hash(puzzle.key)


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other puzzles of the same split.
        variant: The task; None means the default one. With and without suffixes, the puzzles are the same.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    task = variant_named(variant)
    rng = random.Random(f"star_graph/d{task.degree}-l{task.length}/{split}/{seed}")

    def draws() -> Iterator[tuple[str | None, Puzzle]]:
        while True:
            puzzle = draw(rng, task.degree, task.length)
            yield puzzle.key if split_of(puzzle) == split else None, puzzle

    rows = (
        {
            "graph": puzzle.graph,
            "start": puzzle.start,
            "goal": puzzle.goal,
            "path": " ".join(puzzle.path),
            "variant": variant or DEFAULT_VARIANT,
        }
        for puzzle in distinct(draws(), size)
    )
    return numbered(split, seed, rows, "graph", "start", "goal")


def reference(example: dspy.Example) -> dspy.Prediction:
    """The right answer, as the example's program would return it."""
    backwards = " ".join(reversed(nodes_in(example.path)))
    if variant_named(example.variant).two:
        return dspy.Prediction(plan=backwards, path=example.path)
    return dspy.Prediction(reasoning=f"From the goal back to the start: {backwards}.", path=example.path)


# --- Metric ----------------------------------------------------------------------------------------------------------


def grade(got: Nodes, right: Nodes, graph: str) -> float:
    """1.0 for the right nodes in the right order, else at most 0.4.

    0.1 for the share of steps that follow an edge to a new node, and 0.3 for the share of inner nodes at their
    places, each over the longer of the two. Start and goal are given, so they earn nothing. A whole wrong arm is 0.1.
    """
    if got == right:
        return 1.0
    steps = walked(got, edges_of(graph)) / max(len(got) - 1, len(right) - 1)
    inner = range(1, len(right) - 1)
    placed = sum(got[at : at + 1] == right[at : at + 1] for at in inner) / max(len(got) - 2, len(inner))
    return WALK_SHARE * steps + PLACE_SHARE * placed


STRATEGY = {
    "find": "Trace the path backwards from the goal, then reverse it.",
    "plan": "List the nodes from the goal back to the start, edge by edge.",
    "answer": "Turn the plan's list of nodes around, so that it begins at the start and ends at the goal.",
}
"""What a predictor should do, said of every wrong answer."""


def explain(got: Nodes, right: Nodes, graph: str, role: str) -> str:
    """Feedback on one answer: what was got and expected, in quotes, then general sentences, the strategy last."""
    if got == right:
        return "Right."
    found = f'Got "{_shown(got)}"' if got else "Got no nodes"
    lines = [f'{found}, expected "{" ".join(right)}".']
    if not got:
        lines.append("Write the numbers of the nodes, in order.")
    elif walked(got, edges_of(graph)) < len(got) - 1:
        lines.append("Every step must follow an edge of the graph to a new node.")
    if role != "plan" and (got[:1], got[-1:]) != (right[:1], right[-1:]):
        lines.append("Begin at the start and end at the goal.")
    return " ".join([*lines, STRATEGY[role]])


def _shown(nodes: Nodes, most: int = 40) -> str:
    """A rambling answer is cut: its beginning tells enough."""
    return " ".join(nodes[:most]) + (" ..." if len(nodes) > most else "")


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades the path, and by `pred_name` the plan: it should list the path's nodes backwards.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the path's score and all feedback.
        pred_trace: Not used.
    """
    task = variant_named(example.variant)
    roles = {"plan": "plan", "answer": "answer"} if task.two else {"find.predict": "find"}
    path = nodes_in(example.path)
    answer = nodes_in(getattr(prediction, "path", None)), path
    plan = _merged(nodes_in(getattr(prediction, "plan", None))), path[::-1]

    def judge(name: str) -> tuple[float, str]:
        got, right = plan if roles[name] == "plan" else answer
        score = grade(got, right, example.graph)
        return float(score == 1.0) if task.exact else score, explain(got, right, example.graph, roles[name])

    return by_predictor(pred_name, roles, judge, judge(list(roles)[-1])[0])


def _merged(nodes: Nodes) -> Nodes:
    """A node named twice in a row, as in `81 to 33, 33 to 17`, counts once: a plan may be written as edges."""
    return tuple(node for at, node in enumerate(nodes) if node != nodes[at - 1] or at == 0)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for a model of 8B parameters on one GPU of 80 GB. Untested.

    Group, cap, KL weight and fast budget are the paper's; the learning rate is a guess for LoRA. Graphs are short,
    so that a batch of 32 x 8 rollouts is cheap.
    """
    from fst_optimizer import FSTConfig

    variant_named(variant)
    return FSTConfig().with_values(
        {
            "fast.anchor_size": 64,
            "fast.max_rollouts": 960,
            "rollout.batch_size": 32,
            "rollout.group_size": 8,
            "train.lr": 4e-5,
            "train.kl_coef": 0.001,
            "train.microbatch_tokens": 16384,
            "train.gradient_checkpointing": True,
            "eval.max_examples": 128,
            "budget.max_cycles": 30,
        }
    )
