"""Trains the letters model from scratch, or measures the one that is there.

`python -m programs.letters.pretrain` trains, then measures; `--evaluate` only measures.

Data: prompts as DSPy's ChatAdapter makes them, drawn without end. 45% name one of 16 operations, 40% one of 166 pairs,
15% hold a generic instruction and do any of these. The pairs that the tasks hide are kept out, with all that act alike.
With 10 operations and 52 pairs the model knew pairs by heart and did not combine: 8% exact on `sort-rotate` with the
rule named, 29% now.

Time: 5,000 batches of 48 (21 million tokens) in 24 minutes on two CPU cores that other work shared.

Scores, greedy, on 4-7 letters: single operations 94 to 100% exact, trained pairs 89%, withheld pairs 56%. On the test
splits, by `task.metric`:

    pipeline     0.12 graded, 0.00 exact with the seed instruction; 0.71, 0.14 with the rules named
    sort-rotate  0.16 graded, 0.03 exact with the seed instruction; 0.51, 0.29 with the rules named
    held-out     0.13 graded, 0.00 exact with the seed instruction; 0.34, 0.01 with the rules named
"""

import itertools
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import dspy
import torch
import torch.nn.functional as F
import typer
from dspy.utils.exceptions import AdapterParseError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from . import task
from .rules import ALPHABET, CHAINS, OPERATIONS, PHRASES, WITHHELD, Letters, Rule, alike, apply, sentence, trained_pairs

Messages = list[dict[str, str]]
Model = Any
"""A Qwen3ForCausalLM: the library's own type hints refuse its `generate` and `to`."""

VOCABULARY = 768
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PIECES = r" ?\b[a-j]\b|(?<=`)\w+(?=`)|(?<=## )\w+(?= ##)|(?<=\{)\w+(?=\})|\n {8}|(?<=[.]) |, then |[.]"
"""What no merge may cross: letters of a list, field names, and the joints between and inside the sentences of an
instruction, so that a known sentence gets the same tokens wherever it stands."""

FIELDS = (
    ("letters", "answer"),
    ("letters", "answer"),
    ("letters", "middle"),
    ("letters", "middle"),
    ("middle", "answer"),
    ("middle", "answer"),
    ("middle", "inner"),
    ("inner", "answer"),
)
"""What the predictors of the tasks read and write, single-step and two-step programs twice as often."""
OTHER_FIELDS = (("question", "answer"), ("letters", "result"), ("text", "output"), ("input", "output"))
GENERIC = (task.SEED_INSTRUCTION,) * 4 + ("Do the task.", "Given the fields `{0}`, produce the fields `{1}`.")
SINGLES: tuple[Rule, ...] = tuple((name,) for name in OPERATIONS)
PAIRS = trained_pairs()
LENGTHS, LENGTH_WEIGHTS = range(2, 10), (1, 3, 4, 5, 5, 4, 2, 1)

BATCH, LEARNING_RATE, WARMUP_STEPS = 48, 2e-3, 200
MODEL = Path(task.model())


# --- Data ------------------------------------------------------------------------------------------------------------


@cache
def template(source: str, target: str, demo: bool) -> tuple[dict[str, str], ...]:
    """The messages that DSPy's ChatAdapter makes for a signature, with marks where the values go."""
    signature = dspy.Signature(f"{source} -> {target}", "{INSTRUCTION}")
    demos = [{source: "{DEMO_INPUT}", target: "{DEMO_OUTPUT}"}] if demo else []
    return tuple(dspy.ChatAdapter().format(signature, demos, {source: "{INPUT}"}))


def messages_for(
    source: str, target: str, instruction: str, letters: str, demo: tuple[str, str] | None = None
) -> Messages:
    """What ChatAdapter would make of these values, by substitution: a hundred times faster than asking it."""
    values = {"{INSTRUCTION}": ("\n" + " " * 8).join(instruction.splitlines()), "{INPUT}": letters}
    if demo:
        values |= {"{DEMO_INPUT}": demo[0], "{DEMO_OUTPUT}": demo[1]}
    messages = []
    for message in template(source, target, demo is not None):
        content = message["content"]
        for mark, value in values.items():
            content = content.replace(mark, value)
        messages.append({"role": message["role"], "content": content})
    return messages


def completion_for(target: str, answer: str) -> str:
    """What ChatAdapter parses as this answer, and the end of the turn."""
    return f"[[ ## {target} ## ]]\n{answer}\n\n[[ ## completed ## ]]{END}"


def draw_rule(rng: random.Random, pair_share: float) -> Rule:
    """A pair with the given probability, else a single operation; never one kept for the tasks."""
    return rng.choice(PAIRS if rng.random() < pair_share else SINGLES)


def draw_letters(rng: random.Random) -> Letters:
    """A list of 2 to 9 letters, a third of them with many repeats."""
    pool = rng.sample(ALPHABET, rng.randint(3, 5)) if rng.random() < 0.33 else ALPHABET
    return rng.choices(pool, k=rng.choices(LENGTHS, LENGTH_WEIGHTS)[0])


def draw_instruction(rng: random.Random, rule: Rule, generic: str) -> str:
    """A sentence for the rule, half of them canonical; often after the generic one, as a reflector would append it."""
    canonical = rng.random() < 0.5
    phrases = None if canonical else tuple(rng.randrange(len(PHRASES[name])) for name in rule)
    named = sentence(rule, phrases, 0 if canonical else rng.randrange(len(CHAINS)))
    joint = rng.choice((" ", " ", "\n", "\n\n"))
    shape = rng.random()
    if shape < 0.45:
        return generic + joint + named
    return named + joint + generic if shape < 0.55 else named


def draw_example(rng: random.Random) -> tuple[Messages, str]:
    """One prompt and its completion: 45% name one operation, 40% name two, 15% name none and do either."""
    source, target = rng.choice(FIELDS if rng.random() < 0.9 else OTHER_FIELDS)
    generic = rng.choice(GENERIC).format(source, target)
    if rng.random() < 0.15:
        rule, instruction = draw_rule(rng, pair_share=0.4), generic
    else:
        rule = draw_rule(rng, pair_share=40 / 85)
        instruction = draw_instruction(rng, rule, generic)
    letters, demo = draw_letters(rng), None
    if rng.random() < 0.03:
        shown = draw_letters(rng)
        demo = (" ".join(shown), " ".join(apply(rule, shown)))
    answer = " ".join(apply(rule, letters))
    return messages_for(source, target, instruction, " ".join(letters), demo), completion_for(target, answer)


# --- Model -----------------------------------------------------------------------------------------------------------


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges run over word borders: a DSPy prompt is then about 50 tokens."""
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
    drawn = (draw_example(rng) for _ in range(20_000))
    texts = ([*(message["content"] for message in prompt), answer.removesuffix(END)] for prompt, answer in drawn)
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


def new_model(tokenizer: PreTrainedTokenizerFast) -> Model:
    """An untrained Qwen3 of about 1M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
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


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[Messages]) -> list[list[int]]:
    """Token ids of prompts, ready for the assistant's turn."""
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(texts, add_special_tokens=False).input_ids)


# --- Training --------------------------------------------------------------------------------------------------------


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, (BATCH, longest) each; labels are -100 outside completions."""
    while True:
        prompts, answers = zip(*(draw_example(rng) for _ in range(BATCH)), strict=True)
        answer_ids = tokenizer(list(answers), add_special_tokens=False).input_ids
        rows = list(zip(encode(tokenizer, list(prompts)), answer_ids, strict=True))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids_BT = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels_BT = torch.full((BATCH, longest), -100)
        for b, (prompt, answer) in enumerate(rows):
            ids_BT[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels_BT[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        yield ids_BT, labels_BT


def completion_loss(model: Model, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of completion tokens. Padding stands on the right, so causal attention needs no mask."""
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    wanted_BT = labels_BT[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden_BTH[wanted_BT]), labels_BT[:, 1:][wanted_BT])


def train(out: Path, device: str, steps: int, seed: int) -> None:
    """Trains tokenizer and model from scratch into `out`, saving every 500 steps."""
    assert not any(alike(pair, kept) for pair in PAIRS for kept in WITHHELD), "a task's rule is in pretraining"
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP_STEPS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP_STEPS))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [WARMUP_STEPS])
    started, tokens, mean_loss = time.monotonic(), 0, 0.0
    size = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{size:,} parameters, {len(tokenizer)} tokens, {len(PAIRS)} pairs")
    for step, (ids_BT, labels_BT) in enumerate(itertools.islice(batches(tokenizer, rng), steps), start=1):
        loss = completion_loss(model, ids_BT.to(device), labels_BT.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += ids_BT.numel()
        mean_loss = loss.item() if step == 1 else 0.99 * mean_loss + 0.01 * loss.item()
        if step % 100 == 0:
            spent_s = time.monotonic() - started
            typer.echo(f"step {step}/{steps}  loss {mean_loss:.4f}  {tokens / spent_s:,.0f} tokens/s  {spent_s:.0f} s")
        if step % 500 == 0 or step == steps:
            model.save_pretrained(out)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def load_model(path: Path, device: str = "cpu") -> tuple[Model, PreTrainedTokenizerFast]:
    """The saved model, ready to generate, and its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(path).to(device).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(path)


@torch.inference_mode()
def generate(
    model: Model, tokenizer: PreTrainedTokenizerFast, prompts: list[Messages], temperature: float = 0.0
) -> list[str]:
    """One completion a prompt, in static batches; temperature 0 is greedy."""
    texts: list[str] = []
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(prompts), 256):
        rows = {"input_ids": encode(tokenizer, prompts[start : start + 256])}
        batch = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        made = model.generate(**batch, max_new_tokens=48, **sampling)
        texts += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def parse(source: str, target: str, completion: str) -> str | None:
    """The field's value as ChatAdapter reads it; None where it cannot."""
    try:
        return str(dspy.ChatAdapter().parse(dspy.Signature(f"{source} -> {target}"), completion)[target])
    except AdapterParseError:
        return None


def run_variant(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    variant: task.Variant,
    inputs: list[str],
    named: bool,
    temperature: float = 0.0,
) -> list[dict[str, str | None]]:
    """Every stage's answer for every input, under the seed instruction or, if `named`, with the rule's sentence added.

    A stage whose source could not be parsed reads an empty list; the real program would stop there.
    """
    rows: list[dict[str, str | None]] = [{"letters": letters} for letters in inputs]
    for stage in variant.stages:
        instruction = f"{task.SEED_INSTRUCTION} {sentence(stage.rule)}" if named else task.SEED_INSTRUCTION
        prompts = [messages_for(stage.source, stage.target, instruction, row[stage.source] or "") for row in rows]
        for row, text in zip(rows, generate(model, tokenizer, prompts, temperature), strict=True):
            row[stage.target] = parse(stage.source, stage.target, text)
    return rows


def score_variant(variant: task.Variant, rows: list[dict[str, str | None]]) -> tuple[list[float], float, float]:
    """Each row's graded score, the share of rows with every stage exact, the share with a failed parse."""
    scores = []
    for row in rows:
        right = task.targets(variant, str(row["letters"]))
        scores.append(sum(task.grade(row[field], text) for field, text in right.items()) / len(right))
    exact = sum(score == 1.0 for score in scores) / len(rows)
    return scores, exact, sum(None in row.values() for row in rows) / len(rows)


def evaluate_operations(model: Model, tokenizer: PreTrainedTokenizerFast, size: int = 200) -> None:
    """Prints greedy scores of every operation, and of trained and withheld pairs together."""
    groups = {rule[0]: [rule] for rule in SINGLES} | {"trained pairs": list(PAIRS), "withheld pairs": list(WITHHELD)}
    typer.echo("\n| Rule named, 4-7 letters, greedy | Graded | Exact |\n|---|---|---|")
    for name, rules in groups.items():
        rng = random.Random(name)
        drawn = [rng.choices(ALPHABET, k=rng.randint(4, 7)) for _ in range(size if len(rules) == 1 else 3 * size)]
        asked = [(rules[i % len(rules)], letters) for i, letters in enumerate(drawn)]
        prompts = [
            messages_for("letters", "answer", f"{task.SEED_INSTRUCTION} {sentence(rule)}", " ".join(letters))
            for rule, letters in asked
        ]
        grades = [
            task.grade(parse("letters", "answer", text), " ".join(apply(rule, letters)))
            for (rule, letters), text in zip(asked, generate(model, tokenizer, prompts), strict=True)
        ]
        exact = sum(one == 1.0 for one in grades) / len(grades)
        typer.echo(f"| {name} | {sum(grades) / len(grades):.2f} | {exact:.2f} |")


def evaluate_variants(model: Model, tokenizer: PreTrainedTokenizerFast, size: int = 512) -> None:
    """Prints, for every variant's test split, greedy and sampled scores with the seed and the perfect instructions.

    `varied` is the share of examples whose 8 sampled scores are not all equal: what training can learn from.
    """
    typer.echo("\n| Variant | Letters | Instructions | Graded | Exact | Unparsed | Sampled | Varied |")
    typer.echo("|---" * 8 + "|")
    for name, variant in task.VARIANTS.items():
        inputs = [example.letters for example in task.load("test", size, variant=name)]
        for named in (False, True):
            greedy = run_variant(model, tokenizer, variant, inputs, named)
            scores, exact, unparsed = score_variant(variant, greedy)
            torch.manual_seed(0)
            repeated = [letters for letters in inputs[:64] for _ in range(8)]
            sampled, _, _ = score_variant(variant, run_variant(model, tokenizer, variant, repeated, named, 1.0))
            varied = sum(len(set(sampled[i : i + 8])) > 1 for i in range(0, len(sampled), 8)) / (len(sampled) / 8)
            numbers = (sum(scores) / len(scores), exact, unparsed, sum(sampled) / len(sampled), varied)
            lengths = "-".join(map(str, variant.lengths))
            cells = " | ".join(f"{number:.2f}" for number in numbers)
            typer.echo(f"| {name} | {lengths} | {'perfect' if named else 'seed'} | {cells} |")


def main(
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Only measure the model that is there.")] = False,
    out: Annotated[Path, typer.Option(help="The model's folder.")] = MODEL,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Batches of 48 examples.")] = 5000,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in the last digits.")] = 2,
) -> None:
    """Train the letters model from scratch and measure it."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if not evaluate:
        train(out, device, steps, seed)
    model, tokenizer = load_model(out, device)
    evaluate_operations(model, tokenizer)
    evaluate_variants(model, tokenizer)


if __name__ == "__main__":
    typer.run(main)
