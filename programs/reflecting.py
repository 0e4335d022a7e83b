"""Reflection models trained from scratch: data as GEPA's prompt shows it, training, and measuring.

A family of tasks gives a `Draw` of lessons: examples that a policy answered under some instruction, with feedback
that says what was right, and the instruction that a good reflector would write. A small model learns to read the one
and write the other; in a run it answers GEPA's reflection prompt through `reflection_lm=`, as any LM would.
"""

import itertools
import random
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from transformers import PreTrainedTokenizerFast

from fst_optimizer.evolve.reflect import reflection_prompt, written_instruction

from .pretraining import END, Messages, Model, generate, new_model, train_tokenizer

Entry = Mapping[str, Any]
"""An example as a reflector reads it: `Inputs`, `Generated Outputs` and `Feedback`."""


@dataclass(frozen=True)
class Lesson:
    """One prompt to reflect on, and what to write."""

    current: str
    """The instruction that the outputs were made under."""
    entries: tuple[Entry, ...]
    """The examples that the prompt shows."""
    answers: tuple[str, ...]
    """For each example the right answer as its feedback spells it; empty where it does not, or cannot be inferred."""
    instruction: str
    """What to write."""

    @property
    def prompt(self) -> str:
        """GEPA's prompt, as the run renders it."""
        return str(reflection_prompt(self.current, self.entries))

    @property
    def messages(self) -> Messages:
        """What the model is asked: dspy makes one message of the user's from a prompt."""
        return [{"role": "user", "content": self.prompt}]

    @property
    def completion(self) -> str:
        """The instruction as GEPA asks for it, between backticks, and the end of the turn."""
        return f"```\n{self.instruction}\n```{END}"


MAX_WRITTEN = 48
"""Most tokens that a reflector is let write when it is measured."""
PART = 16
"""Lessons that go through the model together."""

INSTRUCTION, ANSWER = 1, 2
"""What a token is that training counts."""

Draw = Callable[[random.Random, int], Lesson]
"""Draws a lesson of that many examples."""


@dataclass(frozen=True)
class Recipe:
    """How a reflector is trained."""

    draw: Draw
    vocabulary: int
    pieces: str
    """A regular expression of what no merge of the tokenizer may cross."""
    examples: Sequence[int] = (2, 3, 4, 4, 4, 4, 4, 5, 6)
    """How many examples a batch's lessons have, drawn from these; a run shows `fast.minibatch` of them, 4."""
    batch: int = 64
    lr: float = 2e-3
    warmup_steps: int = 100
    answer_weight: float = 0.3
    """Weight of the loss on the answers of all examples but the first, beside 1 for the instruction."""
    intermediate: int = 320
    tokenizer_lessons: int = 4000
    report_every: int = 25
    save_every: int = 50
    early: Draw | None = None
    """Easier lessons to begin with, for `early_steps`: there it finds out sooner that answers follow from inputs."""
    early_steps: int = 0


# --- Data ------------------------------------------------------------------------------------------------------------


def fixed_texts() -> tuple[str, ...]:
    """GEPA's own sentences: what its prompt holds before the instruction, between it and the examples, and after."""
    before, _, rest = str(reflection_prompt("{CURRENT}", [{"Inputs": "{SHOWN}"}])).partition("{CURRENT}")
    between, _, shown = rest.partition("# Example 1\n")
    return before, between, shown.partition("{SHOWN}\n\n")[2]


def make_tokenizer(recipe: Recipe, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer for which GEPA's sentences are a token each."""
    whole, rng = fixed_texts(), random.Random(f"tokenizer/{seed}")
    lessons = (recipe.draw(rng, rng.choice(recipe.examples)) for _ in range(recipe.tokenizer_lessons))
    texts = ((*_without(lesson.prompt, whole), lesson.completion.removesuffix(END)) for lesson in lessons)
    return train_tokenizer(itertools.chain.from_iterable(texts), recipe.vocabulary, recipe.pieces, whole)


def _without(text: str, parts: Sequence[str]) -> list[str]:
    return [rest for rest in re.split("|".join(map(re.escape, parts)), text) if rest]


def answer_spans(lesson: Lesson) -> list[tuple[int, int]]:
    """Where in the prompt the feedback of each example but the first spells the right answer."""
    prompt, at, spans = lesson.prompt, 0, []
    for number, (entry, answer) in enumerate(zip(lesson.entries, lesson.answers, strict=True), start=1):
        feedback = str(entry["Feedback"]).strip()
        at = prompt.index(f"# Example {number}\n", at)
        at = prompt.index(f"## Feedback\n{feedback}", at) + len("## Feedback\n")
        if answer and number > 1:
            start = at + feedback.rindex(f'"{answer}"') + 1
            spans.append((start, start + len(answer)))
    return spans


def encode_lessons(tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson]) -> list[tuple[list[int], list[int]]]:
    """Each lesson's token ids, and what each of them is: `INSTRUCTION`, `ANSWER` or the mark that ends one, or 0."""
    asked = [lesson.messages for lesson in lessons]
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    written = tokenizer([lesson.completion for lesson in lessons], add_special_tokens=False).input_ids
    rows = []
    for text, ids, offsets, answer, lesson in zip(
        texts, prompts.input_ids, prompts.offset_mapping, written, lessons, strict=True
    ):
        kinds, shift = [0] * len(ids), text.index(lesson.prompt)
        starts = [start - shift for start, _ in offsets]
        for start, end in answer_spans(lesson):
            for at in range(bisect_left(starts, start), bisect_right(starts, end)):
                kinds[at] = ANSWER
        rows.append((ids + answer, kinds + [INSTRUCTION] * len(answer)))
    return rows


def padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and kinds as tensors, (batch, longest) both, with padding on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    return ids_BT, torch.tensor([kinds + [0] * (longest - len(kinds)) for _, kinds in rows])


def batch_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, step: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batch of a step, in parts of like length. Nothing but these decides it, so a training can go on anywhere."""
    rng = random.Random(f"lessons/{seed}/{step}")
    size = rng.choice(recipe.examples)
    draw = recipe.early if recipe.early is not None and step <= recipe.early_steps else recipe.draw
    rows = encode_lessons(tokenizer, [draw(rng, size) for _ in range(recipe.batch)])
    rows.sort(key=lambda row: len(row[0]))
    return [padded(rows[at : at + PART], tokenizer.pad_token_id) for at in range(0, len(rows), PART)]


# --- Training --------------------------------------------------------------------------------------------------------


def losses_of(model: Model, ids_BT: torch.Tensor, kinds_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of instructions and of answers. Padding stands on the right, so it needs no mask."""
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    kinds_BT = kinds_BT[:, 1:]
    wanted_BT = kinds_BT > 0
    kinds = kinds_BT[wanted_BT]
    losses = F.cross_entropy(model.lm_head(hidden_BTH[wanted_BT]), ids_BT[:, 1:][wanted_BT], reduction="none")
    return losses[kinds == INSTRUCTION].sum(), losses[kinds == ANSWER].sum()


def backward(
    model: Model, batch: Sequence[tuple[torch.Tensor, torch.Tensor]], answer_weight: float, bf16: bool
) -> tuple[float, float]:
    """Adds the gradient of the mean loss on instructions plus the weighted one on answers; gives both means."""
    counts = [max(1, sum(int((kinds_BT == kind).sum()) for _, kinds_BT in batch)) for kind in (INSTRUCTION, ANSWER)]
    means = [0.0, 0.0]
    for ids_BT, kinds_BT in batch:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            written, answered = (
                loss / count for loss, count in zip(losses_of(model, ids_BT, kinds_BT), counts, strict=True)
            )
        (written + answer_weight * answered).backward()  # type: ignore[no-untyped-call]
        means[0] += written.item()
        means[1] += answered.item()
    return means[0], means[1]


def rate(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the learning rate at a step, from 1 to `steps`: linearly up, then linearly down to nearly 0."""
    return min(step / (warmup_steps + 1), (steps - step + 1) / max(1, steps - warmup_steps))


def train(recipe: Recipe, out: Path, steps: int, seed: int, snapshot: Path, bf16: bool = False) -> None:
    """Train tokenizer and model into `out`: a linear warm-up, then linearly down to 0 at `steps`.

    `bf16` multiplies matrices in bfloat16, half as fast again where a CPU has instructions for it.
    `snapshot` holds what a training that was cut off goes on from; with fewer steps in all it ends sooner.
    """
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out) if snapshot.exists() else make_tokenizer(recipe, seed)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, recipe.intermediate)
    optimizers = optimizers_of(model, recipe.lr)
    done, tokens, spent_s = 0, 0, 0.0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        done, tokens, spent_s = state["done"], state["tokens"], state["cpu_s"]
    typer.echo(f"{sum(part.numel() for part in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    began_s, losses = time.process_time() - spent_s, list[tuple[float, float]]()
    for step in range(done + 1, steps + 1):
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = recipe.lr * rate(step, steps, recipe.warmup_steps)
        batch = batch_of(recipe, tokenizer, seed, step)
        model.zero_grad()
        losses.append(backward(model, batch, recipe.answer_weight, bf16))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += sum(ids_BT.numel() for ids_BT, _ in batch)
        if step % recipe.report_every == 0:
            written_mean, answered_mean = (sum(row) / len(losses) for row in zip(*losses, strict=True))
            losses.clear()
            typer.echo(
                f"step {step}/{steps}  instructions {written_mean:.3f}  answers {answered_mean:.3f}  "
                f"{tokens:,} tokens  {time.process_time() - began_s:.0f} s of CPU"
            )
        if step % recipe.save_every == 0 or step == steps:
            cpu_s = time.process_time() - began_s
            kept = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": kept, "done": step}
            _save(state | {"tokens": tokens, "cpu_s": cpu_s}, snapshot)
            model.save_pretrained(out)


def optimizers_of(model: Model, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings and norms. Muon came with torch 2.9.

    docs/decisions.md has what the letters reflector learned with AdamW for all, on feedback that was worded otherwise.
    """
    inside, rest = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for name, parameter in model.named_parameters():
        (inside if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return (
        torch.optim.Muon(inside, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    )


def _save(state: dict[str, Any], path: Path) -> None:
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How often what was written is right, and how often right or nearly so."""

    greedy: float
    any_of_8: float
    """At temperature 1."""
    near: float
    """Greedy, counting what is nearly right."""
    any_near: float
    """At temperature 1, counting what is nearly right."""


def measure(
    model: Model, tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson], grade: Callable[[str, Lesson], float]
) -> Score:
    """Scores on lessons; `grade` gives 1 for a text that tells what the lesson wants, 0.5 for one that nearly does.

    Sampling draws from torch's own generator.
    """

    def best(copies: int, temperature: float) -> list[float]:
        prompts = [lesson.messages for lesson in lessons for _ in range(copies)]
        texts = generate(model, tokenizer, prompts, temperature, MAX_WRITTEN)
        asked = [lesson for lesson in lessons for _ in range(copies)]
        grades = [grade(written_instruction(text), lesson) for text, lesson in zip(texts, asked, strict=True)]
        return [max(grades[at : at + copies]) for at in range(0, len(grades), copies)]

    greedy, sampled = best(1, 0.0), best(8, 1.0)
    shares = [sum(one >= least for one in row) / len(lessons) for least in (1.0, 0.5) for row in (greedy, sampled)]
    return Score(*shares)


def table(title: str, scores: Mapping[str, Score]) -> str:
    """The scores as a Markdown table."""
    lines = [f"| {title} | Greedy | Any of 8 | Greedy, nearly | Any of 8, nearly |", "|---" * 5 + "|"]
    for name, score in scores.items():
        cells = " | ".join(f"{one:.2f}" for one in (score.greedy, score.any_of_8, score.near, score.any_near))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)
