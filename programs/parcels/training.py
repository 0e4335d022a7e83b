"""The training loop of the parcels model: hints inside prompts, batches of like length, and snapshots to go on from.

A hint is a word that the model is to think of at a word of the prompt: here, at each word of a parcel, what the first
line that speaks of it says. One answer a prompt is a thin signal: without hints the model still guessed after 3,500
batches.

Nothing but seed and step decides a batch, so that a training can be cut off and go on, with more steps or with fewer.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from transformers import PreTrainedTokenizerFast

from ..pretraining import END, ROLES, Messages, Model, encode, new_model, train_tokenizer

TOGETHER = 8
"""Batches that are drawn together, so that each can hold prompts of like length: with little padding."""


Draw = Callable[[random.Random], tuple[Messages, str, tuple[tuple[str, str], ...]]]
"""Draws a prompt, its completion, and words of the user's turn, in order, each with its hint, "" for none."""
ANSWER, HINT = 1, 2
"""What a token is that training counts."""


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    lessons: tuple[tuple[int, Draw], ...]
    """From which step on prompts are drawn how; the first from 0, easy ones first."""
    vocabulary: int
    pieces: str
    """A regular expression of what no merge of the tokenizer may cross."""
    intermediate: int = 192
    tokenizer_examples: int = 20_000
    batch: int = 48
    lr: float = 2e-3
    warmup_steps: int = 100
    falling_steps: int = 500
    """The rate is even, and falls to 0 over the last steps."""
    hint_weight: float = 0.5
    """Of the mean loss on hints, beside 1 for the mean on completions."""
    report_every: int = 50
    save_every: int = 100


def tokenizer_of(recipe: Recipe, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer for the last and hardest lessons."""
    rng = random.Random(f"tokenizer/{seed}")
    drawn = (recipe.lessons[-1][1](rng) for _ in range(recipe.tokenizer_examples))
    texts = ([*(message["content"] for message in prompt), answer.removesuffix(END)] for prompt, answer, _ in drawn)
    return train_tokenizer(itertools.chain.from_iterable(texts), recipe.vocabulary, recipe.pieces)


Row = tuple[list[int], list[int], list[int]]
"""Token ids, what each of them is to be answered with, and whether that is an answer, a hint or nothing (0)."""


def rows_of(draw: Draw, tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int) -> list[Row]:
    """So many prompts, the shortest first."""
    drawn = [draw(rng) for _ in range(count)]
    prompts = encode(tokenizer, [prompt for prompt, _, _ in drawn])
    answers = tokenizer([answer for _, answer, _ in drawn], add_special_tokens=False).input_ids
    number, user, none = (
        tokenizer.convert_tokens_to_ids,
        tokenizer.convert_tokens_to_ids(ROLES[1]),
        tokenizer.eos_token_id,
    )
    rows = []
    for (_, _, hints), prompt, answer in zip(drawn, prompts, answers, strict=True):
        ids, at = prompt + answer, prompt.index(user)
        # What a token is answered with stands one place after it, as in a text.
        wanted, kinds = list(ids), [0] * len(prompt) + [ANSWER] * len(answer)
        for word, hint in hints:
            at = prompt.index(number(word), at + 1)
            wanted[at + 1], kinds[at + 1] = number(hint) if hint else none, HINT
        rows.append((ids, wanted, kinds))
    return sorted(rows, key=lambda row: len(row[0]))


def batches_from(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, done: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows of every step after `done`, (batch, longest) each, with padding on the right."""
    for chunk in itertools.count(done // TOGETHER):
        rng = random.Random(f"parcels/{seed}/{chunk}")
        draw = next(draw for start, draw in reversed(recipe.lessons) if start <= chunk * TOGETHER)
        rows = rows_of(draw, tokenizer, rng, TOGETHER * recipe.batch)
        parts = [rows[at : at + recipe.batch] for at in range(0, len(rows), recipe.batch)]
        rng.shuffle(parts)
        for part in parts[done % TOGETHER if chunk == done // TOGETHER else 0 :]:
            longest = max(len(ids) for ids, _, _ in part)
            columns = zip(*part, strict=True)
            ids, wanted, kinds = ([row + [0] * (longest - len(row)) for row in column] for column in columns)
            yield torch.tensor(ids), torch.tensor(wanted), torch.tensor(kinds)


def losses_of(
    model: Model, ids_BT: torch.Tensor, wanted_BT: torch.Tensor, kinds_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of completions and of hints. Padding stands on the right, so attention needs no mask."""
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    wanted_BT, kinds_BT = wanted_BT[:, 1:], kinds_BT[:, 1:]
    counted_BT = kinds_BT > 0
    kinds = kinds_BT[counted_BT]
    losses = F.cross_entropy(model.lm_head(hidden_BTH[counted_BT]), wanted_BT[counted_BT], reduction="none")
    return losses[kinds == ANSWER].mean(), losses[kinds == HINT].mean()


def train(recipe: Recipe, out: Path, steps: int, seed: int, snapshot: Path) -> None:
    """Train tokenizer and model into `out`; where there is a snapshot, go on from it."""
    torch.manual_seed(seed)
    state = torch.load(snapshot, weights_only=True) if snapshot.exists() else None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out) if state else tokenizer_of(recipe, seed)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, recipe.intermediate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    done, tokens, spent_s = 0, 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, tokens, spent_s = state["done"], state["tokens"], state["cpu_s"]
    typer.echo(f"{sum(part.numel() for part in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    began_s, losses = time.process_time() - spent_s, list[tuple[float, float]]()
    for step, batch in enumerate(batches_from(recipe, tokenizer, seed, done), start=done + 1):
        if step > steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / recipe.warmup_steps, (steps - step + 1) / recipe.falling_steps)
        optimizer.zero_grad()
        answered, hinted = losses_of(model, *batch)
        (answered + recipe.hint_weight * hinted).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += batch[0].numel()
        losses.append((answered.item(), hinted.item()))
        cpu_s = time.process_time() - began_s
        if step % recipe.report_every == 0:
            means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
            losses.clear()
            said = f"answers {means[0]:.4f}  hints {means[1]:.4f}  {tokens:,} tokens  {cpu_s:.0f} s of CPU"
            typer.echo(f"step {step}/{steps}  {said}")
        if step % recipe.save_every == 0 or step == steps:
            model.save_pretrained(out)
            made = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step}
            torch.save(made | {"tokens": tokens, "cpu_s": cpu_s}, snapshot.with_suffix(".new"))
            snapshot.with_suffix(".new").replace(snapshot)
