"""Trains the parcels reflector from scratch, or measures the one that is there.

`python -m programs.parcels.reflect` trains, then measures; `--evaluate` only measures.

A lesson shows parcels that a predictor answered under some instruction, with feedback of the kind `shown`, and wants
the rule's sentences. Four examples hardly tell a rule of three clauses: what is learned is to guess well, and to keep
of the current instruction what the examples do not contradict.

Time: 3,000 batches of 64 (23 million tokens) in 45 minutes of one CPU core, with `--bf16`.

Scores on 100 lessons of four examples, all of the rule told, greedy / any of 8 at temperature 1: one clause .24 / .37,
two clauses .03 / .10, two clauses withheld .04 / .08, three clauses .04 / .05. Who obeys the best of 8 scores .80, .68,
.63 and .59; .35 to .38 before.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging as transformers_logging

from fst_optimizer.evolve.reflect import written_instruction
from fst_optimizer.task_kit import feedback

from .. import reflecting
from ..pretraining import generate, load_model
from ..reflecting import Entry, Lesson
from . import pretrain, rules, task
from .pretrain import Lines, lines_of, text_of, way_by
from .rules import STAGES, Rule, Stage

VOCABULARY = 896
PIECES = rf"{pretrain.PIECES}|```\n|\n```|\""
REFLECTOR = Path(__file__).parent / "reflector"
Fits = Callable[[Rule], bool]


# --- Lessons ---------------------------------------------------------------------------------------------------------


def draw_rule(rng: random.Random, stage: Stage) -> Rule:
    """A trained rule: 40% of one clause, 35% of two, 25% of three; some clauses of two conditions."""
    return rules.draw_trained(rng, stage, rng.choices((1, 2, 3), (40, 35, 25))[0], 0.2)


def draw_current(rng: random.Random, stage: Stage, rule: Rule) -> tuple[str, Lines]:
    """An instruction to improve on, and its lines: none, some right ones, right and wrong ones, or all wrong."""
    share, right = rng.random(), lines_of(rule)
    if share < 0.4:
        lines: Lines = []
    elif share < 0.75:
        lines = [line for line in right if rng.random() < 0.5]
    else:
        other = lines_of(rules.draw_trained(rng, stage, rng.choice((1, 2)), 0.2))
        lines = [line for line in right if rng.random() < 0.4] if share < 0.9 else []
        lines += [line for line in other if rng.random() < 0.6 and line[0] not in [kept[0] for kept in lines]]
    lines.sort(key=lambda line: line[0])
    named = text_of(lines)
    if not named:
        return task.SEED_INSTRUCTION, []
    return (f"{task.SEED_INSTRUCTION} {named}" if rng.random() < 0.3 else named), lines


def draw_entry(rng: random.Random, stage: Stage, rule: Rule, told: Lines, hidden: rules.Rules) -> tuple[Entry, str]:
    """An example and its right answer, "" where the feedback does not say it."""
    parcel = rules.draw_parcel(rng, hidden)
    ways = rules.applied(hidden, parcel)
    # An earlier predictor may have been wrong: what is right follows from the right carrier all the same.
    shown = ways[0] if rng.random() < 0.6 else rng.choice(list(rules.SORT.answers))
    way = way_by(told, parcel, shown) if rng.random() < 0.9 else None
    answer, right = stage.answers[way or rng.choice(list(stage.answers))], stage.answers[ways[len(hidden) - 1]]
    values = {"parcel": rules.text_of(parcel), "carrier": rules.SORT.answers[shown]}
    score = task.grade(answer, right)
    entry = {
        "Inputs": {source: values[source] for source in stage.sources},
        "Generated Outputs": {stage.target: answer},
        "Feedback": feedback("shown", score, answer, right, "", lambda: ""),
    }
    return entry, right if score < 1 else ""


def draw_lesson(
    rng: random.Random, size: int, stage: Stage | None = None, draw: Callable[[Stage], Rule] | None = None
) -> Lesson:
    """A lesson on a trained rule, or one that is drawn, under an instruction that failed on an example at least."""
    stage = stage or rng.choice(STAGES)
    while True:
        rule = draw(stage) if draw else draw_rule(rng, stage)
        hidden = (rule,) if stage is rules.SORT else (rules.draw_rule(rng, rules.SORT, 2, 0.0), rule)
        if len({outcome[-1] for outcome, _ in rules.cells(hidden)}) < len(rule.clauses) + 1:
            continue  # a clause that never decides cannot be found
        current, told = draw_current(rng, stage, rule)
        rows = [draw_entry(rng, stage, rule, told, hidden) for _ in range(size)]
        if any(answer for _, answer in rows):
            text = " ".join(rules.sentences(rule))
            return Lesson(current, tuple(entry for entry, _ in rows), tuple(answer for _, answer in rows), text)


def draw_early(rng: random.Random, size: int) -> Lesson:
    """A lesson to begin with: one clause of one condition."""
    return draw_lesson(rng, size, draw=lambda stage: rules.draw_trained(rng, stage, 1, 0.0))


RECIPE = reflecting.Recipe(draw_lesson, VOCABULARY, PIECES, early=draw_early, early_steps=800)


# --- Training and measuring ------------------------------------------------------------------------------------------


PHRASES = {said: word for word, (said, _) in rules.LIMITS.items()}
SENTENCE = re.compile(rf"(?:({'|'.join(rules.RANKS)}), use (\w+) for ([\w ]+)|Otherwise, use (\w+))\.")


def lines_in(text: str) -> Lines:
    """The lines that a text's sentences make; what is no sentence of the grammar is left out."""
    lines: Lines = []
    for rank, way, said, other in SENTENCE.findall(text):
        if other:
            lines.append((len(rules.RANKS), (), other))
            continue
        limits = [word for phrase, word in PHRASES.items() if phrase in said]
        for phrase in PHRASES:
            said = said.replace(phrase, "")
        words = [word for word in said.split() if word in rules.WORDS]
        if words or limits:
            lines.append((rules.RANKS.index(rank), tuple(sorted((*words, *limits), key=_attribute)), way))
    return lines


def _attribute(word: str) -> int:
    return rules.ORDER.index(rules.WORDS[word])


def is_right(text: str, lesson: Lesson) -> bool:
    """Whether a text tells the lesson's rule, and no other line."""
    return sorted(lines_in(text)) == sorted(lines_in(lesson.instruction))


def obeyed(text: str, lesson: Lesson, parcels: int = 64) -> float:
    """How often whoever obeys a text is right about parcels of the lesson's rule; where no line fits, by chance."""
    told, right, rng = lines_in(text), lines_in(lesson.instruction), random.Random(lesson.instruction)
    stage = next(stage for stage in STAGES if stage.target in lesson.entries[0]["Generated Outputs"])
    total = 0.0
    for _ in range(parcels):
        parcel, taken = pretrain.draw_parcel(rng, stage, right)
        way = way_by(told, parcel, taken)
        total += 1 / len(stage.answers) if way is None else float(way == way_by(right, parcel, taken))
    return total / parcels


def evaluate(out: Path, lessons: int = 100) -> None:
    """Prints, by clauses of the rule, how often all of it is told, and the score of whoever obeys what is written."""
    model, tokenizer = load_model(out)

    def of_dev(rule: Rule) -> bool:
        return "dev" in rules.parts(rule) <= {"dev", "trained"}

    typer.echo(
        "\n| Rule, 4 examples | All told, greedy | Any of 8 | Before | Greedy, obeyed | Best of 8 |\n"
        + "|---" * 6
        + "|"
    )
    for name, clauses, fits in (
        ("one clause", 1, rules.is_trained),
        ("two clauses", 2, rules.is_trained),
        ("two clauses, withheld", 2, of_dev),
        ("three clauses", 3, rules.is_trained),
    ):
        rng = random.Random(name)

        def draw(stage: Stage, rng: random.Random = rng, clauses: int = clauses, fits: Fits = fits) -> Rule:
            while not fits(rule := rules.draw_rule(rng, stage, clauses, 0.2)):
                pass
            return rule

        drawn = [draw_lesson(rng, 4, draw=draw) for _ in range(lessons)]
        score = reflecting.measure(model, tokenizer, drawn, is_right)
        greedy = map(written_instruction, generate(model, tokenizer, [lesson.messages for lesson in drawn]))
        torch.manual_seed(0)
        asked = [lesson.messages for lesson in drawn for _ in range(8)]
        sampled = iter([written_instruction(text) for text in generate(model, tokenizer, asked, 1.0)])
        best = [max(obeyed(next(sampled), lesson) for _ in range(8)) for lesson in drawn]
        before = [obeyed(lesson.current, lesson) for lesson in drawn]
        after = [obeyed(text, lesson) for text, lesson in zip(greedy, drawn, strict=True)]
        numbers = (score.greedy, score.any_of_8, *(sum(row) / lessons for row in (before, after, best)))
        typer.echo(f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")


def main(
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate", help="Only measure the reflector that is there.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The model's folder.")] = REFLECTOR,
    snapshot: Annotated[Path, typer.Option(help="Where a training that was cut off goes on.")] = Path("snapshot.pt"),
    steps: Annotated[int, typer.Option(min=1, help="Batches of 64 lessons.")] = 3000,
    bf16: Annotated[bool, typer.Option(help="Multiply in bfloat16, for CPUs that have instructions for it.")] = False,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in the last digits.")] = 1,
) -> None:
    """Train the parcels reflector from scratch and measure it."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if not evaluate_only:
        reflecting.train(RECIPE, out, steps, seed, snapshot, bf16)
    evaluate(out)


if __name__ == "__main__":
    typer.run(main)
