"""What the two `pretrain.py` share: prompts, the network and its tokenizer, training and generating."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dspy
import torch
import torch.nn.functional as F
import typer
from dspy.utils.exceptions import AdapterParseError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Messages = list[dict[str, str]]
Values = tuple[tuple[str, str], ...]
"""Names and values of fields, in order."""
Model = Any
"""A Qwen3ForCausalLM: the library's own type hints refuse its `generate` and `to`."""
Draw = Callable[[random.Random], tuple[Messages, str]]
"""Draws a prompt and its completion, which ends with `END`."""

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    draw: Draw
    vocabulary: int
    pieces: str
    """A regular expression of what no merge of the tokenizer may cross."""
    tokenizer_examples: int
    batch: int
    warmup_steps: int
    report_every: int
    save_every: int
    lr: float = 2e-3


# --- Prompts ---------------------------------------------------------------------------------------------------------


@cache
def template(sources: tuple[str, ...], targets: tuple[str, ...], demo: bool = False) -> tuple[dict[str, str], ...]:
    """The messages that DSPy's ChatAdapter makes for a signature, with marks where the values go."""
    signature = dspy.Signature(f"{', '.join(sources)} -> {', '.join(targets)}", "{INSTRUCTION}")
    demos = [{name: f"{{DEMO OF {name}}}" for name in (*sources, *targets)}] if demo else []
    return tuple(dspy.ChatAdapter().format(signature, demos, {source: f"{{VALUE OF {source}}}" for source in sources}))


def messages_for(instruction: str, inputs: Values, targets: tuple[str, ...], demo: Values = ()) -> Messages:
    """What ChatAdapter would make of these values, by substitution: a hundred times faster than asking it."""
    marks = {"{INSTRUCTION}": ("\n" + " " * 8).join(instruction.splitlines())}
    marks |= {f"{{VALUE OF {name}}}": value for name, value in inputs}
    marks |= {f"{{DEMO OF {name}}}": value for name, value in demo}
    messages = []
    for message in template(tuple(name for name, _ in inputs), targets, bool(demo)):
        content = message["content"]
        for mark, value in marks.items():
            content = content.replace(mark, value)
        messages.append({"role": message["role"], "content": content})
    return messages


def completion_for(outputs: Values) -> str:
    """What ChatAdapter parses as these outputs, and the end of the turn."""
    fields = "".join(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in outputs)
    return f"{fields}[[ ## completed ## ]]{END}"


def parse(signature: str, field: str, completion: str) -> str | None:
    """The field's value as ChatAdapter reads it; None where it cannot."""
    try:
        return str(dspy.ChatAdapter().parse(dspy.Signature(signature), completion)[field])
    except AdapterParseError:
        return None


# --- Model -----------------------------------------------------------------------------------------------------------


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, pieces: str, whole: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges run over word borders, but not over `pieces`; each of `whole` is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(role, special=True) for role in ROLES])
    bpe.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, intermediate_size: int = 384) -> Model:
    """An untrained Qwen3 of about 1M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def load_model(path: Path, device: str = "cpu") -> tuple[Model, PreTrainedTokenizerFast]:
    """The saved model, ready to generate, and its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(path).to(device).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[Messages]) -> list[list[int]]:
    """Token ids of prompts, ready for the assistant's turn."""
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(texts, add_special_tokens=False).input_ids)


# --- Training --------------------------------------------------------------------------------------------------------


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels without end, (batch, longest) each; labels are -100 outside completions."""
    while True:
        prompts, answers = zip(*(recipe.draw(rng) for _ in range(recipe.batch)), strict=True)
        answer_ids = tokenizer(list(answers), add_special_tokens=False).input_ids
        rows = list(zip(encode(tokenizer, list(prompts)), answer_ids, strict=True))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids_BT = torch.full((recipe.batch, longest), tokenizer.pad_token_id)
        labels_BT = torch.full((recipe.batch, longest), -100)
        for b, (prompt, answer) in enumerate(rows):
            ids_BT[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels_BT[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        yield ids_BT, labels_BT


def completion_loss(model: Model, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of completion tokens. Padding stands on the right, so causal attention needs no mask."""
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    wanted_BT = labels_BT[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden_BTH[wanted_BT]), labels_BT[:, 1:][wanted_BT])


def train(recipe: Recipe, out: Path, steps: int, seed: int, device: str = "cpu") -> None:
    """Train tokenizer and model from scratch into `out`: AdamW, a linear warm-up, then a cosine."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    drawn = (recipe.draw(rng) for _ in range(recipe.tokenizer_examples))
    texts = ([*(message["content"] for message in prompt), answer.removesuffix(END)] for prompt, answer in drawn)
    tokenizer = train_tokenizer(itertools.chain.from_iterable(texts), recipe.vocabulary, recipe.pieces)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=recipe.warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - recipe.warmup_steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [recipe.warmup_steps])
    started, tokens, losses = time.monotonic(), 0, []
    typer.echo(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    rows: Iterable[tuple[torch.Tensor, torch.Tensor]] = itertools.islice(batches(recipe, tokenizer, rng), steps)
    for step, (ids_BT, labels_BT) in enumerate(rows, start=1):
        loss = completion_loss(model, ids_BT.to(device), labels_BT.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += ids_BT.numel()
        losses.append(loss.item())
        if step % recipe.report_every == 0:
            recent = sum(losses[-recipe.report_every :]) / recipe.report_every
            spent_s, cpu_s = time.monotonic() - started, time.process_time()
            typer.echo(
                f"step {step}/{steps}  loss {recent:.4f}  {tokens:,} tokens  {spent_s:.0f} s, {cpu_s:.0f} s of CPU"
            )
        if step % recipe.save_every == 0 or step == steps:
            model.save_pretrained(out)


@torch.inference_mode()
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Messages],
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """One completion a prompt, in static batches; temperature 0 is greedy."""
    texts: list[str] = []
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(prompts), 256):
        rows = {"input_ids": encode(tokenizer, prompts[start : start + 256])}
        batch = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        made = model.generate(**batch, max_new_tokens=max_new_tokens, **sampling)
        texts += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
