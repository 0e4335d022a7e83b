"""Trains the parcels model from scratch, or measures the one that is there.

`python -m programs.parcels.pretrain` trains, then measures; `--evaluate` only measures.

Data: prompts as DSPy's ChatAdapter makes them, drawn without end. 15% hold a generic instruction and any of the four
answers, 5% sentences that make no rule, the rest a rule: of one clause 44%, of two 55%, of three 1%; a clause has two
conditions in 12%. A third lack some sentences, a third have them in another order. A quarter of the pairs of
conditions is withheld, in one clause or in two of one rule.

Time: 3,500 batches of 48 (6.9 million tokens) in 8 minutes of one CPU core. The scores are in README.md.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from .. import pretraining
from ..pretraining import Messages, Model, generate, load_model
from . import rules, task, training
from .rules import ATTRIBUTES, LIMITS, RANKS, STAGES, WORDS, Parcel, Rule, Rules, Stage

VOCABULARY = 896
_NAMES = [word for words in ATTRIBUTES.values() for word in words]
_ANSWERS = [word for stage in STAGES for pair in stage.answers.items() for word in pair]
PIECES = rf"\b(?:{'|'.join([*_NAMES, *_ANSWERS])})\b|(?:{'|'.join(RANKS)}|Otherwise), |\n {{8}}|(?<=[a-z])[.] ?"
"""What no merge may cross: words of parcels and answers, ranks, and the joints between sentences. Field names may
merge with the format around them: there are two signatures, and a prompt is 32 tokens instead of 67."""

GENERIC = (task.SEED_INSTRUCTION,) * 4 + ("Do the task.", "Given the fields `{0}`, produce the fields `{1}`.")
UNTOLD, RANDOM = 0.15, 0.05
"""Shares of prompts that hold no rule, and that hold sentences which make none."""
CLAUSES, CLAUSE_WEIGHTS = (1, 2, 3), (44, 55, 1)
BOTH = 0.12
"""How often a clause has two conditions."""
PARTLY, KEPT = 0.3, 0.6
"""How often a prompt has only some of the rule's sentences, and how likely each one is kept then."""
SHUFFLED = 0.3
"""How often the sentences stand in another order."""
TOLD = 0.6
"""How likely a condition of the rule is made true of a parcel."""
MODEL = Path(task.model())


# --- Data ------------------------------------------------------------------------------------------------------------

Lines = list[tuple[int, tuple[str, ...], str]]
"""Rank, conditions and way of each sentence; `Otherwise` is the rank after the last and has no conditions."""


def lines_of(rule: Rule) -> Lines:
    """A rule as lines."""
    named = [(rank, clause.words, clause.way) for rank, clause in enumerate(rule.clauses)]
    return [*named, (len(RANKS), (), rule.other)]


def draw_lines(rng: random.Random, stage: Stage) -> Lines:
    """The lines of a trained rule, often not all of them, or some that make no rule."""
    if rng.random() < RANDOM / (1 - UNTOLD):
        drawn = [lines_of(rules.draw_trained(rng, stage, 1, BOTH)) for _ in range(rng.randint(1, 4))]
        return [(rng.randrange(len(RANKS)), *line[1:]) if line[1] else line for line in map(rng.choice, drawn)]
    clauses = rng.choices(CLAUSES, CLAUSE_WEIGHTS)[0]
    lines = lines_of(rules.draw_trained(rng, stage, clauses, BOTH))
    if rng.random() < PARTLY:
        lines = [line for line in lines if rng.random() < KEPT] or [rng.choice(lines)]
    if rng.random() < SHUFFLED:
        rng.shuffle(lines)
    return lines


def text_of(lines: Lines) -> str:
    """The sentences of these lines, in their order."""
    made = (
        rules.clause_sentence(rank, rules.Clause(words, way)) if words else f"Otherwise, use {way}."
        for rank, words, way in lines
    )
    return " ".join(made)


def draw_parcel(rng: random.Random, stage: Stage, lines: Lines) -> tuple[Parcel, str]:
    """A parcel, and the way that it goes, of which many of the conditions are true."""
    parcel = [rng.choice(words) for words in ATTRIBUTES.values()]
    taken = rng.choice(list(rules.SORT.answers))
    conditions = [word for _, words, _ in lines for word in words if rng.random() < TOLD]
    rng.shuffle(conditions)
    for word in conditions:
        if word in LIMITS:
            parcel[-1] = rules.NUMBERS[rng.choice(LIMITS[word][1]) - 1]
        elif WORDS[word] == "carrier":
            taken = word
        else:
            parcel[list(ATTRIBUTES).index(WORDS[word])] = word
    return tuple(parcel), taken


def way_by(lines: Lines, parcel: Parcel, taken: str) -> str | None:
    """What the first line that fits decides, by their ranks, and among equal ones by place; None if none fits."""
    fitting = (way for _, words, way in sorted(lines, key=lambda line: line[0]) if all_hold(words, parcel, taken))
    return next(fitting, None)


def all_hold(words: tuple[str, ...], parcel: Parcel, taken: str) -> bool:
    """Whether every condition is true."""
    return all(rules.holds(word, parcel, taken) for word in words)


def messages_for(stage: Stage, instruction: str, values: dict[str, str]) -> Messages:
    """The prompt of a stage's predictor."""
    return pretraining.messages_for(
        instruction, tuple((source, values[source]) for source in stage.sources), (stage.target,)
    )


def draw_instruction(rng: random.Random, stage: Stage, named: str) -> str:
    """The sentences, often after the generic one, as a reflector would append them; without any, that one alone."""
    generic = rng.choice(GENERIC).format("`, `".join(stage.sources), stage.target)
    joint, shape = rng.choice((" ", " ", "\n", "\n\n")), rng.random()
    if not named:
        return generic
    if shape < 0.55:
        return generic + joint + named
    return named + joint + generic if shape < 0.6 else named


Drawn = tuple[Messages, str, tuple[tuple[str, str], ...]]
"""A prompt, its completion, and the words of parcel and carrier, each with what the first line says that names it."""


def draw_example(rng: random.Random) -> Drawn:
    """One prompt and its completion, of all kinds."""
    stage = rng.choice(STAGES)
    return answered(rng, stage, [] if rng.random() < UNTOLD else draw_lines(rng, stage))


def answered(rng: random.Random, stage: Stage, lines: Lines) -> Drawn:
    """A prompt with these lines and its completion. Where no line fits, any answer is as good as any other."""
    parcel, taken = draw_parcel(rng, stage, lines)
    way = way_by(lines, parcel, taken) or rng.choice(list(stage.answers))
    values = {"parcel": rules.text_of(parcel), "carrier": rules.SORT.answers[taken]}
    messages = messages_for(stage, draw_instruction(rng, stage, text_of(lines)), values)
    words = list(zip(ATTRIBUTES, parcel, strict=True))
    if stage is rules.PACK:
        words.append(("carrier", values["carrier"]))
    hints = tuple((word, hint_of(lines, name, parcel, taken)) for name, word in words)
    return messages, pretraining.completion_for(((stage.target, stage.answers[way]),)), hints


def hint_of(lines: Lines, attribute: str, parcel: Parcel, taken: str) -> str:
    """What the first line says with a condition on this attribute that holds, whether its others do or not."""
    for _, words, way in sorted(lines, key=lambda line: line[0]):
        if any(WORDS[word] == attribute and rules.holds(word, parcel, taken) for word in words):
            return way
    return ""


def draw_easy(rng: random.Random) -> Drawn:
    """One clause of one condition, and what is done with all others."""
    stage = rng.choice(STAGES)
    known = [word for word, name in WORDS.items() if stage is not rules.SORT or name != "carrier"]
    way, other = rng.sample(list(stage.answers), 2)
    return answered(rng, stage, [(0, (rng.choice(known),), way), (len(RANKS), (), other)])


RECIPE = training.Recipe(((0, draw_easy), (400, draw_example)), VOCABULARY, PIECES)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def ask(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    hidden: Rules,
    parcels: list[Parcel],
    instructions: list[str],
    temperature: float = 0.0,
) -> list[float]:
    """Each parcel's score, the mean of its predictors' grades; the second one is told what the first one answered."""
    values = [{"parcel": rules.text_of(parcel)} for parcel in parcels]
    scores = [0.0] * len(parcels)
    for stage, instruction in zip(STAGES, instructions, strict=False):
        prompts = [messages_for(stage, instruction, row) for row in values]
        signature = f"{', '.join(stage.sources)} -> {stage.target}"
        for i, text in enumerate(generate(model, tokenizer, prompts, temperature)):
            # The real program would stop at an answer that cannot be parsed.
            values[i][stage.target] = pretraining.parse(signature, stage.target, text) or ""
            right = task.targets(hidden, parcels[i])[stage.target]
            scores[i] += task.grade(values[i][stage.target], right) / len(instructions)
    return scores


def told(hidden: Rules) -> list[str]:
    """The right instruction of every predictor."""
    return [" ".join(rules.sentences(rule)) for rule in hidden]


def mean(numbers: list[float]) -> float:
    """The mean."""
    return sum(numbers) / len(numbers)


def evaluate_kinds(model: Model, tokenizer: PreTrainedTokenizerFast, programs: int = 40, each: int = 16) -> None:
    """Prints scores under the right instructions, by how many clauses a rule has and of how many conditions.

    Withheld are rules of the part `dev`; on those of `proof` nothing is measured here.
    """

    def of_dev(rule: Rule) -> bool:
        return "dev" in rules.parts(rule) <= {"dev", "trained"}

    kinds: list[tuple[str, int, float, Callable[[Rule], bool]]] = [
        ("one clause", 1, 0.0, rules.is_trained),
        ("one clause of two conditions", 1, 1.0, rules.is_trained),
        ("one clause of two conditions, withheld", 1, 1.0, of_dev),
        ("two clauses", 2, 0.0, rules.is_trained),
        ("two clauses, withheld", 2, 0.0, of_dev),
        ("two clauses of two conditions", 2, 1.0, rules.is_trained),
        ("three clauses", 3, 0.0, rules.is_trained),
        ("three clauses, withheld", 3, 0.0, of_dev),
    ]
    typer.echo("\n| Rules told, greedy | Score |\n|---|---|")
    for name, clauses, both, fits in kinds:
        rng = random.Random(f"parcels/evaluation/{name}")
        scores: list[float] = []
        for _ in range(programs):
            hidden = rules.draw_program(rng, (clauses, clauses), both, fits)
            parcels = [rules.draw_parcel(rng, hidden) for _ in range(each)]
            scores += ask(model, tokenizer, hidden, parcels, told(hidden))
        typer.echo(f"| {name} | {mean(scores):.2f} |")


def evaluate_variants(model: Model, tokenizer: PreTrainedTokenizerFast, size: int = 256) -> None:
    """Prints, for test splits of the named rules and of `DEV`, scores with the seed and the right instructions.

    `Varied` is the share of examples whose 8 sampled scores are not all equal: what training can learn from.
    """
    typer.echo("\n| Rule | Constant | Instructions | Greedy | Sampled | Varied |\n" + "|---" * 6 + "|")
    for name in (*task.VARIANTS, *task.DEV):
        hidden = task.rules_named(name)
        parcels = [rules.parcel_in(example.parcel) for example in task.load("test", size, variant=name)]
        for which, instructions in (("seed", [task.SEED_INSTRUCTION] * len(hidden)), ("right", told(hidden))):
            greedy = ask(model, tokenizer, hidden, parcels, instructions)
            torch.manual_seed(0)
            repeated = [parcel for parcel in parcels[:64] for _ in range(8)]
            sampled = ask(model, tokenizer, hidden, repeated, instructions, 1.0)
            varied = [float(len(set(sampled[i : i + 8])) > 1) for i in range(0, len(sampled), 8)]
            cells = " | ".join(f"{number:.2f}" for number in (mean(greedy), mean(sampled), mean(varied)))
            typer.echo(f"| `{name}` | {rules.best_constant(hidden):.2f} | {which} | {cells} |")


def main(
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Only measure the model that is there.")] = False,
    out: Annotated[Path, typer.Option(help="The model's folder.")] = MODEL,
    snapshot: Annotated[Path, typer.Option(help="Where a training that was cut off goes on.")] = Path("snapshot.pt"),
    steps: Annotated[int, typer.Option(min=1, help="Batches of 48 examples.")] = 3500,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in the last digits.")] = 1,
) -> None:
    """Train the parcels model from scratch and measure it."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if not evaluate:
        training.train(RECIPE, out, steps, seed, snapshot)
    model, tokenizer = load_model(out)
    evaluate_kinds(model, tokenizer)
    evaluate_variants(model, tokenizer)


if __name__ == "__main__":
    typer.run(main)
