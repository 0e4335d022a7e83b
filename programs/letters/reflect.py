"""Trains the letters reflector from scratch, or measures the one that is there.

`python -m programs.letters.reflect` trains, then measures; `--evaluate` only measures.

Data: GEPA's reflection prompt as a run renders it, drawn without end. 20% of the lessons are on one of 16 operations,
40% on one of 145 pairs, 40% on one of 894 rules of three; 45% begin at a generic instruction, the others at a wrong
one, one that is nearly right or the right one. They show two to six lists of 3 to 9 letters, mostly four, with what a
policy would answer. The rules that `withheld` names are nowhere in it.

Time: 1,500 batches of 64 (16 million tokens) in 24 minutes of one CPU core, with `--bf16`.

Scores on 50 lessons of four examples each, greedy / any of 8 at temperature 1: single operations .92 / .98, trained
pairs .52 / .78, withheld pairs .12 / .28, trained triples .40 / .50, withheld triples .26 / .26. README.md has what is
nearly right, too. The loss was still falling.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging as transformers_logging

from fst_optimizer.task_kit import feedback

from .. import reflecting
from ..pretraining import load_model
from ..reflecting import Entry, Lesson
from . import task
from .pretrain import FIELDS, GENERIC
from .rules import (
    ALPHABET,
    OPERATIONS,
    PHRASES,
    PROOF,
    WITHHELD,
    Letters,
    Rule,
    action,
    apply,
    sentence,
    share,
    shortest,
    withheld,
)

VOCABULARY = 768
PIECES = r" ?\b[a-j]\b|```\n|\n```|, then |\"[.]|\", but \"|\" gives \"|[.] ?"
"""What no merge may cross: letters, backticks, and the joints between and inside the sentences of an instruction and
of the feedback."""

OTHER_FIELDS = (("question", "answer"), ("letters", "result"), ("text", "output"))
REFLECTOR = Path(__file__).parent / "reflector"


# --- Rules -----------------------------------------------------------------------------------------------------------


@cache
def trained(operations: int) -> tuple[Rule, ...]:
    """The rules of that many operations to train on: of each action one, none withheld, none like a shorter one."""
    shorter = shortest(operations - 1)
    found: dict[tuple[str, ...], Rule] = {}
    for rule in permutations(OPERATIONS, operations):
        if action(rule) not in shorter and not withheld(rule):
            found.setdefault(action(rule), rule)
    return tuple(found.values())


def draw_rule(rng: random.Random) -> Rule:
    """20% single operations, 40% pairs, 40% triples: many kinds of compositions keep it from learning them by heart."""
    share = rng.random()
    return rng.choice(trained(1 if share < 0.2 else 2 if share < 0.6 else 3))


# --- Lessons ---------------------------------------------------------------------------------------------------------


LENGTHS, LENGTH_WEIGHTS = range(3, 10), (1, 3, 6, 6, 6, 4, 2)


def draw_letters(rng: random.Random, rule: Rule, longest: int) -> Letters:
    """A list of which the rule leaves something, a sixth of them with many repeats."""
    while True:
        pool = rng.sample(ALPHABET, rng.randint(3, 5)) if rng.random() < 0.16 else ALPHABET
        letters = rng.choices(pool, k=min(longest, rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]))
        if apply(rule, letters):
            return letters
        longest += 1  # three letters may be too few for anything to be left


def slip(rng: random.Random, letters: Letters) -> Letters:
    """The list with a mistake such as a small policy makes: a letter wrong, lost, repeated or in another place."""
    made = list(letters)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(made) + 1), rng.random()
        if kind < 0.4 and at < len(made):
            made[at] = rng.choice(made)
        elif kind < 0.6 and at < len(made) and len(made) > 1:
            made.pop(at)
        elif kind < 0.8 and at < len(made):
            made.insert(at, made[at])
        else:
            made.insert(at, made.pop() if made else rng.choice(ALPHABET))
    return made


def answer_under(rng: random.Random, followed: Rule | None, letters: Letters) -> Letters:
    """What a policy answers that was told a rule; told none, it copies, or does anything."""
    if followed is None:
        followed = ("copy",) if rng.random() < 0.6 else rng.choice(trained(1))
        return slip(rng, apply(followed, letters)) if rng.random() < 0.5 else apply(followed, letters)
    return slip(rng, apply(followed, letters)) if rng.random() < 0.25 else apply(followed, letters)


def near(rng: random.Random, rule: Rule) -> Rule:
    """A rule that shares operations with another: one more, one less, one other, or in another order."""
    operations = list(rule)
    kind = rng.random()
    if kind < 0.3 and len(operations) > 1:
        operations.pop(rng.randrange(len(operations)))
    elif kind < 0.5 and len(operations) > 1:
        rng.shuffle(operations)
    elif kind < 0.8 and len(operations) < 3:
        operations.insert(rng.randint(0, len(operations)), rng.choice(list(OPERATIONS)))
    else:
        operations[rng.randrange(len(operations))] = rng.choice(list(OPERATIONS))
    found = tuple(operations)
    return draw_rule(rng) if withheld(found) or len(set(found)) < len(found) else found


def draw_current(rng: random.Random, rule: Rule, generic: str) -> tuple[str, Rule | None]:
    """An instruction to improve on, and the rule that it tells: none, a wrong one, a near one, or the right one."""
    share = rng.random()
    if share < 0.45:
        return generic, None
    told = draw_rule(rng) if share < 0.65 else near(rng, rule) if share < 0.9 else rule
    phrases = None
    if rng.random() < 0.1:
        phrases = tuple(rng.randrange(len(PHRASES[name])) for name in told)
    text = sentence(told, phrases)
    return (f"{generic} {text}" if rng.random() < 0.25 else text), told


def draw_entry(
    rng: random.Random, fields: tuple[str, str], rule: Rule, followed: Rule | None, before: float, longest: int
) -> tuple[Entry, str]:
    """An example and its right answer.

    Args:
        rng: Draws it.
        fields: What the predictor reads and writes.
        rule: What is right.
        followed: What the policy was told.
        before: How likely an earlier predictor's mistake is: the feedback then speaks of another list than was shown,
            as it does in a run where what was shown is too little to work on.
        longest: Most letters.
    """
    letters = draw_letters(rng, rule, longest)
    shown = answer_under(rng, None, letters) if rng.random() < before else letters
    given, right = " ".join(letters), " ".join(apply(rule, letters))
    answer = " ".join(answer_under(rng, followed, shown))
    words = feedback("shown", task.grade(answer, right), answer, right, "", lambda: "", given)
    entry = {"Inputs": {fields[0]: " ".join(shown)}, "Generated Outputs": {fields[1]: answer}, "Feedback": words}
    return entry, right


def draw_lesson(rng: random.Random, size: int, rule: Rule | None = None, longest: int = 9) -> Lesson:
    """A lesson on a rule, a trained one unless given, under an instruction that failed on an example at least."""
    rule = rule or draw_rule(rng)
    fields = rng.choice(FIELDS if rng.random() < 0.95 else OTHER_FIELDS)
    generic = rng.choice(GENERIC).format(*fields)
    current, followed = draw_current(rng, rule, generic)
    before = rng.random() * 0.6 if fields[0] in ("middle", "inner") and rng.random() < 0.4 else 0.0
    while True:
        rows = [draw_entry(rng, fields, rule, followed, before, longest) for _ in range(size)]
        if any(not entry["Feedback"].startswith("Right") for entry, _ in rows):
            break
    return Lesson(current, tuple(entry for entry, _ in rows), tuple(right for _, right in rows), sentence(rule))


def draw_early(rng: random.Random, size: int) -> Lesson:
    """A lesson to begin with: short lists, few operations."""
    return draw_lesson(rng, size, rng.choice(trained(1 if rng.random() < 0.7 else 2)), rng.choice((3, 4, 5, 6)))


RECIPE = reflecting.Recipe(draw_lesson, VOCABULARY, PIECES, answer_weight=0.5, early=draw_early, early_steps=400)


# --- Training and measuring ------------------------------------------------------------------------------------------


def rule_of(text: str) -> Rule | None:
    """The rule that a text tells in canonical words, perhaps after the seed instruction; None if it tells none."""
    return rules_by_sentence().get(text.removeprefix(task.SEED_INSTRUCTION).strip())


@cache
def rules_by_sentence() -> dict[str, Rule]:
    """Every rule of one to three operations, by its sentence."""
    return {sentence(rule): rule for size in (1, 2, 3) for rule in permutations(OPERATIONS, size)}


def grade(text: str, lesson: Lesson) -> float:
    """1 if a text tells the lesson's rule or one that acts alike, 0.5 if one operation more, less or other would."""
    found, wanted = rule_of(text), rule_of(lesson.instruction)
    assert wanted is not None, "a lesson's instruction is a sentence of the grammar"
    if found is None:
        return 0.0
    if action(found) == action(wanted):
        return 1.0
    return 0.5 if len(wanted) > 1 and any(action(rule) == action(wanted) for rule in neighbours(found)) else 0.0


def neighbours(rule: Rule) -> Iterator[Rule]:
    """The rules that one operation more, less or other makes of a rule."""
    for at in range(len(rule) + 1):
        yield from ((*rule[:at], name, *rule[at:]) for name in OPERATIONS)
    for at in range(len(rule)):
        yield rule[:at] + rule[at + 1 :]
        yield from ((*rule[:at], name, *rule[at + 1 :]) for name in OPERATIONS)


def measured_rules() -> dict[str, tuple[Rule, ...]]:
    """What is measured; no rule that the proof is about is among them."""
    proof = {tuple(stage.split("-")) for name in PROOF for stage in name.split(".")}
    kept = (rule for rule in permutations(OPERATIONS, 3) if action(rule) not in shortest(2) and share(rule) == "dev")
    return {
        "single operations": trained(1),
        "trained pairs": trained(2),
        "withheld pairs": tuple(rule for rule in WITHHELD if rule not in proof),
        "trained triples": trained(3),
        "withheld triples": tuple(kept),
    }


def lessons_on(rules: Sequence[Rule], count: int, seed: str) -> list[Lesson]:
    """Lessons of 4 examples, the same for the same arguments, the rules drawn anew for each."""
    rng = random.Random(f"measure/{seed}")
    return [draw_lesson(rng, 4, rng.choice(rules)) for _ in range(count)]


def main(
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Only measure the reflector that is there.")] = False,
    out: Annotated[Path, typer.Option(help="The model's folder.")] = REFLECTOR,
    snapshot: Annotated[Path, typer.Option(help="Where a training that was cut off goes on.")] = Path("snapshot.pt"),
    steps: Annotated[int, typer.Option(min=1, help="Batches of 64 lessons.")] = 1500,
    bf16: Annotated[bool, typer.Option(help="Multiply in bfloat16, for CPUs that have instructions for it.")] = False,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; results depend on it in the last digits.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Lessons that a kind of rule is measured on.")] = 100,
) -> None:
    """Train the letters reflector from scratch and measure it."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if not evaluate:
        reflecting.train(RECIPE, out, steps, seed, snapshot, bf16)
    model, tokenizer = load_model(out)
    torch.manual_seed(0)
    scores = {
        name: reflecting.measure(model, tokenizer, lessons_on(rules, count, name), grade)
        for name, rules in measured_rules().items()
    }
    typer.echo(reflecting.table("Rule, 4 examples", scores))


if __name__ == "__main__":
    typer.run(main)
