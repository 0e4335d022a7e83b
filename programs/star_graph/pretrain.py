"""Trains a small model for star graphs from scratch, or measures one that is there.

`python -m programs.star_graph.pretrain --out runs/star/model` trains, then measures; `--evaluate` only measures. The
model is not kept in the repository: the README says what it scored.

The network, its training and generating are those of `programs/letters` (see `programs/pretraining.py`). Prompts
of several fields, the tokenizer's pieces and the data are this task's own.

Data: prompts as DSPy's ChatAdapter makes them for the program `find`, of 2 or 3 arms of 2 or 3 edges, drawn without
end. Each names one primitive: neighbours, the node beside the goal, one arm, every arm, a list reversed, the
trace from the goal. 20% hold a general instruction, such as the seed instruction, and walk down an arm drawn at
random. The trace from the goal is asked for, and shown, only under the sentence that the metric's feedback names.

Time: 2,400 batches of 32 (7 million tokens) in 11 minutes on one CPU core that other work shared. That is not enough:
the model learns the form of an answer and copies what it wrote, but seldom finds a node's neighbour (25% greedy, for
the node next to the goal).
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import dspy
import torch
import typer
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from .. import pretraining
from ..pretraining import END, Messages, Model, Values, generate, load_model
from . import task
from .graph import Nodes, Puzzle, draw, nodes_in

VOCABULARY = 1024
PIECES = r"[0-9]{2}|\n {8}|(?<=[.]) "
"""What no merge may cross: a node's number, and the joints between the sentences of an instruction."""

DEGREES, LENGTHS = (2, 3), (2, 3)
NEIGHBOURS = "List the neighbours of the start."
BESIDE = "Name the node next to the goal."
ARM = "Walk from the start along one arm to its end."
ARMS = "List every arm from the start to its end."
REVERSE = "Reverse the list."
TRACE = task.STRATEGY["find"]
WEIGHTS = {NEIGHBOURS: 2, BESIDE: 2, ARM: 1, ARMS: 4, REVERSE: 2, TRACE: 5, "": 4}
"""How often each primitive is asked for; the empty one is a general instruction alone."""
GENERAL = (
    *(task.SEED_INSTRUCTIONS["find"],) * 3,
    "Given the fields `graph`, `start`, `goal`, produce the fields `path`.",
)
OTHER_FEEDBACK = (
    "Every step must follow an edge of the graph to a new node.",
    "Begin at the start and end at the goal.",
)
"""Sentences that feedback may add and that ask for nothing new: with them an instruction means the same."""

BLANK: Values = (("reasoning", ""), ("path", ""))
"""The outputs of the program, where only the prompt is made."""


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One prompt's parts and what should be answered."""

    instruction: str
    inputs: Values
    outputs: Values


def messages_for(shown: Shown) -> Messages:
    """The prompt as DSPy's ChatAdapter makes it."""
    return pretraining.messages_for(shown.instruction, shown.inputs, tuple(name for name, _ in shown.outputs))


def completion_for(shown: Shown) -> str:
    """What ChatAdapter parses as these outputs, and the end of the turn."""
    return pretraining.completion_for(shown.outputs)


def arms_of(puzzle: Puzzle) -> list[Nodes]:
    """Every arm from the centre to its end, in the order in which the graph's text has their first edges."""
    edges = [tuple(edge.split("-")) for edge in puzzle.graph.split(", ")]
    beside: dict[str, list[str]] = {}
    for one, other in edges:
        beside.setdefault(one, []).append(other)
        beside.setdefault(other, []).append(one)
    arms = []
    for first in beside[puzzle.start]:
        arm = [puzzle.start, first]
        while onward := [node for node in beside[arm[-1]] if node != arm[-2]]:
            arm.append(onward[0])
        arms.append(tuple(arm))
    return arms


def outputs_for(primitive: str, puzzle: Puzzle, rng: random.Random) -> tuple[str, str]:
    """Reasoning and path. Without a primitive it is a walk down an arm drawn at random."""
    arms = arms_of(puzzle)
    path = " ".join(puzzle.path)
    if primitive == TRACE:
        return " ".join(reversed(puzzle.path)), path
    if primitive == ARMS:
        return ", ".join(" ".join(arm) for arm in arms), " ".join(arms[0])
    if primitive == NEIGHBOURS:
        answer = " ".join(arm[1] for arm in arms)
    elif primitive == BESIDE:
        answer = puzzle.path[-2]
    else:
        answer = " ".join(rng.choice(arms))
    return answer, answer


def draw_instruction(rng: random.Random, primitive: str) -> str:
    """The primitive's sentence, half of the time after a general one, as a reflector would append it."""
    general = rng.choice(GENERAL)
    named = [primitive] if primitive else []
    parts = [general, *named] if not named or rng.random() < 0.55 else named
    for sentence in OTHER_FEEDBACK:
        if rng.random() < 0.15:
            parts.insert(rng.randint(1, len(parts)), sentence)
    return rng.choice((" ", " ", " ", "\n")).join(parts)


def draw_shown(rng: random.Random) -> Shown:
    """One example of pretraining."""
    primitive = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    puzzle = draw(rng, rng.choice(DEGREES), rng.choice(LENGTHS))
    if primitive == REVERSE:
        inputs, outputs = (("nodes", " ".join(puzzle.path)),), (("path", " ".join(reversed(puzzle.path))),)
        return Shown(REVERSE, inputs, outputs)
    reasoning, path = outputs_for(primitive, puzzle, rng)
    return Shown(draw_instruction(rng, primitive), fields_of(puzzle), (("reasoning", reasoning), ("path", path)))


def fields_of(puzzle: Puzzle | dspy.Example) -> Values:
    """The inputs of the program."""
    return ("graph", puzzle.graph), ("start", puzzle.start), ("goal", puzzle.goal)


def draw_example(rng: random.Random) -> tuple[Messages, str]:
    """One prompt of pretraining and its completion."""
    shown = draw_shown(rng)
    return messages_for(shown), completion_for(shown)


RECIPE = pretraining.Recipe(
    draw_example,
    VOCABULARY,
    PIECES,
    tokenizer_examples=5_000,
    batch=32,
    warmup_steps=100,
    report_every=50,
    save_every=250,
)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def path_in(completion: str) -> str | None:
    """The field `path` as ChatAdapter reads it; None where it cannot."""
    return pretraining.parse("graph -> reasoning, path", "path", completion)


def evaluate_primitives(model: Model, tokenizer: PreTrainedTokenizerFast, size: int = 200) -> None:
    """Prints how often each primitive's whole answer is right, greedily, on graphs as in pretraining.

    For a walk along one arm, and for the seed instruction, any arm is right.
    """
    typer.echo("\n| Instruction alone, greedy | Right |\n|---|---|")
    for primitive in (NEIGHBOURS, BESIDE, ARM, ARMS, TRACE, task.SEED_INSTRUCTIONS["find"]):
        rng = random.Random(primitive)
        puzzles = [draw(rng, rng.choice(DEGREES), rng.choice(LENGTHS)) for _ in range(size)]
        prompts = [messages_for(Shown(primitive, fields_of(puzzle), BLANK)) for puzzle in puzzles]
        right = 0
        for puzzle, text in zip(puzzles, generate(model, tokenizer, prompts), strict=True):
            if primitive in (ARM, task.SEED_INSTRUCTIONS["find"]):
                right += nodes_in(path_in(text)) in arms_of(puzzle)
            else:
                outputs = zip(("reasoning", "path"), outputs_for(primitive, puzzle, rng), strict=True)
                right += text == completion_for(Shown("", (), tuple(outputs))).removesuffix(END)
        typer.echo(f"| {primitive} | {right / size:.2f} |")


def grades(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[dspy.Example],
    instruction: str,
    temperature: float = 0.0,
) -> tuple[list[float], int]:
    """The graded score of an answer to each example, and how many answers could not be parsed."""
    prompts = [messages_for(Shown(instruction, fields_of(example), BLANK)) for example in examples]
    paths = [path_in(text) for text in generate(model, tokenizer, prompts, temperature)]
    scores = [
        task.grade(nodes_in(path), nodes_in(example.path), example.graph)
        for path, example in zip(paths, examples, strict=True)
    ]
    return scores, paths.count(None)


def evaluate_variants(model: Model, tokenizer: PreTrainedTokenizerFast, variants: list[str], size: int = 256) -> None:
    """Prints scores on test splits with the seed instruction and with the feedback's strategy after it.

    `Sampled` is at temperature 1, 8 samples each of 64 puzzles; `Varied` the share of these puzzles whose 8 scores
    are not all equal, graded and then all or nothing: what training can learn from.
    """
    typer.echo("\n| Variant | Instruction | Graded | Exact | Unparsed | Sampled | Exact | Varied | Varied, exact |")
    typer.echo("|---" * 9 + "|")
    seed = task.SEED_INSTRUCTIONS["find"]
    for variant in variants:
        examples = task.load("test", size, variant=variant)
        for name, instruction in (("seed", seed), ("with strategy", f"{seed} {TRACE}")):
            greedy, unparsed = grades(model, tokenizer, examples, instruction)
            torch.manual_seed(0)
            repeated = [example for example in examples[:64] for _ in range(8)]
            sampled, _ = grades(model, tokenizer, repeated, instruction, temperature=1.0)
            groups = [sampled[at : at + 8] for at in range(0, len(sampled), 8)]
            numbers = (
                sum(greedy) / len(greedy),
                greedy.count(1.0) / len(greedy),
                unparsed / len(greedy),
                sum(sampled) / len(sampled),
                sampled.count(1.0) / len(sampled),
                sum(len(set(group)) > 1 for group in groups) / len(groups),
                sum(0 < group.count(1.0) < 8 for group in groups) / len(groups),
            )
            typer.echo(f"| {variant} | {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")


def main(
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Only measure the model that is there.")] = False,
    out: Annotated[Path, typer.Option(help="The model's folder.")] = Path("runs/star/model"),
    variant: Annotated[list[str] | None, typer.Option(help="Measured variants of one predictor.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 32 examples.")] = 2400,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in the last digits.")] = 1,
    nice: Annotated[int, typer.Option(min=0, help="Added to the process's niceness.")] = 5,
) -> None:
    """Train a small model for star graphs from scratch and measure it."""
    torch.set_num_threads(threads)
    os.nice(nice)
    transformers_logging.disable_progress_bar()
    if not evaluate:
        pretraining.train(RECIPE, out, steps, seed)
    model, tokenizer = load_model(out)
    evaluate_primitives(model, tokenizer)
    evaluate_variants(model, tokenizer, variant or ["d2-l3", "d3-l3", "d3-l4"])


if __name__ == "__main__":
    typer.run(main)
