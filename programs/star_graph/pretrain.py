"""Trains a small model for star graphs from scratch, or measures one that is there.

`python -m programs.star_graph.pretrain --out runs/star/model` trains, then measures; `--evaluate` only measures. The
model is not kept in the repository: the README says what it scored.

The recipe is that of `programs/letters/pretrain.py`, and so are the network, its loss and the generating. Prompts of
several fields, the tokenizer's pieces and the data are this task's own.

Data: prompts as DSPy's ChatAdapter makes them for the program `find`, of 2 or 3 arms of 2 or 3 edges, drawn without
end. Each names one primitive: neighbours, the node beside the goal, one arm, every arm, a list reversed, the
trace from the goal. 20% hold a general instruction, such as the seed instruction, and walk down an arm drawn at
random. The trace from the goal is asked for, and shown, only under the sentence that the metric's feedback names.

Time: 2,400 batches of 32 (7 million tokens) in 11 minutes on one CPU core that other work shared. That is not enough:
the model learns the form of an answer and copies what it wrote, but seldom finds a node's neighbour (25% greedy, for
the node next to the goal).
"""

import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import dspy
import torch
import typer
from dspy.utils.exceptions import AdapterParseError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from programs.letters.pretrain import (
    CHAT_TEMPLATE,
    END,
    PAD,
    ROLES,
    Messages,
    Model,
    completion_loss,
    encode,
    generate,
    load_model,
    new_model,
)

from . import task
from .graph import Nodes, Puzzle, draw, nodes_in

Values = tuple[tuple[str, str], ...]
"""Names and values of fields, in order."""

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

BATCH, LEARNING_RATE, WARMUP_STEPS = 32, 2e-3, 100


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One prompt's parts and what should be answered."""

    instruction: str
    inputs: Values
    outputs: Values


@cache
def template(sources: tuple[str, ...], targets: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    """The messages that DSPy's ChatAdapter makes for a signature, with marks where the values go."""
    signature = dspy.Signature(f"{', '.join(sources)} -> {', '.join(targets)}", "{INSTRUCTION}")
    return tuple(dspy.ChatAdapter().format(signature, [], {source: f"{{VALUE OF {source}}}" for source in sources}))


def messages_for(shown: Shown) -> Messages:
    """What ChatAdapter would make of these values, by substitution: a hundred times faster than asking it."""
    marks = {"{INSTRUCTION}": ("\n" + " " * 8).join(shown.instruction.splitlines())}
    marks |= {f"{{VALUE OF {name}}}": value for name, value in shown.inputs}
    messages = []
    for message in template(tuple(dict(shown.inputs)), tuple(dict(shown.outputs))):
        content = message["content"]
        for mark, value in marks.items():
            content = content.replace(mark, value)
        messages.append({"role": message["role"], "content": content})
    return messages


def completion_for(shown: Shown) -> str:
    """What ChatAdapter parses as these outputs, and the end of the turn."""
    fields = "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in shown.outputs)
    return f"{fields}[[ ## completed ## ]]{END}"


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


# --- Training --------------------------------------------------------------------------------------------------------


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges run over word borders; a node's number is one token wherever it stands."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    drawn = (draw_shown(rng) for _ in range(5_000))
    texts = ([*(part["content"] for part in messages_for(one)), completion_for(one)[: -len(END)]] for one in drawn)
    bpe.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    bpe.add_special_tokens([AddedToken(role, special=True) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, (BATCH, longest) each; labels are -100 outside completions."""
    while True:
        drawn = [draw_shown(rng) for _ in range(BATCH)]
        prompts = encode(tokenizer, [messages_for(shown) for shown in drawn])
        answers = tokenizer([completion_for(shown) for shown in drawn], add_special_tokens=False).input_ids
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids_BT = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels_BT = torch.full((BATCH, longest), -100)
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids_BT[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels_BT[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        yield ids_BT, labels_BT


def train(out: Path, steps: int, seed: int) -> None:
    """Trains tokenizer and model from scratch into `out`, saving every 250 steps."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP_STEPS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP_STEPS))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [WARMUP_STEPS])
    started, tokens, losses = time.monotonic(), 0, []
    size = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{size:,} parameters, {len(tokenizer)} tokens")
    for step, (ids_BT, labels_BT) in enumerate(itertools.islice(batches(tokenizer, rng), steps), start=1):
        loss = completion_loss(model, ids_BT, labels_BT)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += ids_BT.numel()
        losses.append(loss.item())
        if step % 50 == 0:
            spent_s, cpu_s = time.monotonic() - started, time.process_time()
            recent = sum(losses[-50:]) / 50
            typer.echo(
                f"step {step}/{steps}  loss {recent:.4f}  {tokens:,} tokens  {spent_s:.0f} s, {cpu_s:.0f} s of CPU"
            )
        if step % 250 == 0 or step == steps:
            model.save_pretrained(out)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def path_in(completion: str) -> str | None:
    """The field `path` as ChatAdapter reads it; None where it cannot."""
    try:
        return str(dspy.ChatAdapter().parse(dspy.Signature("graph -> reasoning, path"), completion)["path"])
    except AdapterParseError:
        return None


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
        train(out, steps, seed)
    model, tokenizer = load_model(out)
    evaluate_primitives(model, tokenizer)
    evaluate_variants(model, tokenizer, variant or ["d2-l3", "d3-l3", "d3-l4"])


if __name__ == "__main__":
    typer.run(main)
