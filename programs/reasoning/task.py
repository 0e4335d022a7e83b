"""Reasoning: any data set of the reasoning-gym package by name, scored by its own scorer, for a program of two steps.

A variant is a data set's name, with settings after commas: `chain_sum` or `chain_sum,min_terms=2,max_terms=3`. The
first predictor works the question out, the second gives the answer alone, in the form that the scorer reads.
"""

import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.sandbox import Sandbox, Stopped
from fst_optimizer.task_kit import by_predictor, checked_size, distinct, numbered, split_by_hash

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

DEFAULT_VARIANT = "chain_sum"
SIZES = {"train": 512, "val": 128, "test": 256}
LARGEST_SIZE = 4096
PATIENCE = 500
"""Draws in a row that bring no new question of a split, after which it is taken to have no more."""
CHUNK = 16
"""Entries drawn in one call of the helper."""
DRAW_CPU_S, SCORE_CPU_S = 120.0, 10.0
"""Processor time for a chunk and for one score, in seconds."""
WORKING_TOKENS, ANSWER_TOKENS = 2048, 1024
"""Of one completion. The longest answers are grids of a few hundred numbers."""
END_CHARS = 100
"""How near to its end, in characters, the working must hold the result to count in full."""
SHOWN_CHARS = 300
"""Of an answer, in feedback."""

SOLVE = "Work through the question step by step, and end with the result."
ANSWER = (
    "Give the final answer of the question alone, in exactly the form that the question asks for, "
    "with no words around it."
)

_sandbox = Sandbox(Path(__file__).parent / "drawer.py")


@dataclass(frozen=True)
class Variant:
    """One data set with its settings."""

    name: str
    settings: dict[str, Any]


class ReasoningProgram(dspy.Module):  # type: ignore[misc]
    """`solve` writes the working, `answer` takes the answer out of it."""

    def __init__(self) -> None:
        """Two `dspy.Predict`, the second with the rule of the format."""
        super().__init__()
        self.solve = dspy.Predict(dspy.Signature("question -> working", SOLVE), max_tokens=WORKING_TOKENS)
        self.answer = dspy.Predict(dspy.Signature("question, working -> answer", ANSWER), max_tokens=ANSWER_TOKENS)

    def forward(self, question: str) -> dspy.Prediction:
        """Works the question out, then answers it; the prediction has both fields."""
        working = self.solve(question=question).working
        return dspy.Prediction(working=working, answer=self.answer(question=question, working=working).answer)


def parse_variant(variant: str | None) -> Variant:
    """The data set and settings that a variant names: `NAME` or `NAME,SETTING=VALUE,...`.

    Values are read as JSON where they are JSON (`3`, `0.5`, `true`, `["+","-"]`) and as text where they are not.
    Raises ValueError where the text does not have that form.
    """
    name, *pairs = re.split(r",(?![^\[]*\])", variant or DEFAULT_VARIANT)
    settings = {}
    for pair in pairs:
        setting, equals, text = pair.partition("=")
        if not (setting and equals and text):
            raise ValueError(f"setting {pair!r} in variant {variant!r} is not SETTING=VALUE; see programs/reasoning")
        try:
            settings[setting.strip()] = json.loads(text)
        except ValueError:
            settings[setting.strip()] = text
    return Variant(name.strip(), settings)


def variant_named(variant: str | None) -> Variant:
    """The variant, when reasoning-gym has such a data set that takes such settings.

    Raises:
        ValueError: It has not (the nearest names are given), or the package is not installed.
    """
    task = parse_variant(variant)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"data set {task.name!r} needs the package reasoning-gym; run `pip install reasoning-gym`")
    _sandbox.call("check", cpu_s=DRAW_CPU_S, name=task.name, settings=task.settings)
    return task


def build_program(variant: str | None = None) -> ReasoningProgram:
    """The seed program, the same for every data set; no LM attached."""
    variant_named(variant)
    return ReasoningProgram()


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other questions of the same split.
        variant: The data set and its settings; None means the default one.

    Raises:
        ValueError: A wrong argument, or a data set that has fewer distinct questions.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    task = variant_named(variant)
    pairs = ((entry["question"], entry) for entry in stream(task, seed))
    draws = ((question if split_by_hash(question) == split else None, entry) for question, entry in pairs)
    entries = distinct(draws, size, PATIENCE)
    if len(entries) < size:
        raise ValueError(
            f"data set {task.name!r} has only {len(entries)} distinct questions in its {split} split, not {size} "
            f"({PATIENCE} draws brought no more); ask for at most {len(entries)}, or give settings that allow more"
        )
    rows = ({"variant": variant or DEFAULT_VARIANT, **entry} for entry in entries)
    return numbered(split, seed, rows, "question")


def stream(task: Variant, seed: int) -> Iterator[dict[str, str]]:
    """The entries of a data set without end, of all splits; questions may come again."""
    first = random.Random(f"reasoning/{seed}").randrange(2**30)
    for start in itertools.count(first, CHUNK):
        yield from _chunk(task.name, json.dumps(task.settings), start)


@lru_cache(maxsize=512)
def _chunk(name: str, settings_json: str, seed: int) -> list[dict[str, str]]:
    """At most `CHUNK` entries, kept so that the three splits draw them once."""
    settings = json.loads(settings_json)
    try:
        entries: list[dict[str, str]] = _sandbox.call(
            "draw", cpu_s=DRAW_CPU_S, name=name, settings=settings, seed=seed, size=CHUNK
        )
    except Stopped as error:
        raise ValueError(f"data set {name!r} with the settings {settings}: {error}; give easier settings") from error
    return entries


def reference(example: dspy.Example) -> dspy.Prediction:
    """What the program should return. Raises ValueError where the data set names no right answer."""
    if not example.answer:
        raise ValueError(f"the data set of variant {example.variant!r} names no right answer; it only checks answers")
    return dspy.Prediction(working=f"The result is {example.answer}", answer=example.answer)


@lru_cache(maxsize=8192)
def _score(variant: str, entry: str, answer: str) -> float:
    task = parse_variant(variant)
    try:
        return float(
            _sandbox.call(
                "score", cpu_s=SCORE_CPU_S, name=task.name, settings=task.settings, entry=entry, answer=answer
            )
        )
    except Stopped:
        return 0.0


def grade_answer(example: dspy.Example, answer: object) -> float:
    """The data set's own score, from 0 to 1; no text is 0, and so is an answer that its scorer cannot cope with."""
    if not isinstance(answer, str) or not answer.strip():
        return 0.0
    return _score(example.variant, example.entry, answer)


def grade_working(example: dspy.Example, working: object, answer: object) -> float:
    """The score of the best answer that the working holds: in full when it is near the end, half when elsewhere.

    Looked for are the reference answer, which is worth 1, and the program's own answer, which is worth its score:
    where many answers are right, the reference is only one of them.
    """
    known = [(example.answer, 1.0)] if example.answer else []
    if isinstance(answer, str) and answer.strip() and answer != example.answer:
        known.append((answer, grade_answer(example, answer)))
    return max((place(working, text) * worth for text, worth in known), default=0.0)


def place(working: object, answer: str) -> float:
    """1.0 when the working ends with the answer, within `END_CHARS`; 0.5 when it is elsewhere in it; 0 when not at all.

    Only whole words and numbers count (`12` is not in `-12`, `12.5` or `312`), and spaces and line ends are all alike.
    """
    words, wanted = " ".join(working.split()) if isinstance(working, str) else "", " ".join(answer.split())
    before = r"(?<![\w.-])" if wanted[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w|[.,]\d)"
    found = [match.end() for match in re.finditer(before + re.escape(wanted) + after, words)]
    if not found:
        return 0.0
    return 1.0 if len(words) - found[-1] <= END_CHARS else 0.5


def explain_answer(example: dspy.Example, answer: object, score: float, in_working: bool) -> str:
    """Feedback on the answer: what was got and expected, in quotes, then a sentence that names nothing of it."""
    if score == 1.0:
        return "Right."
    given = isinstance(answer, str) and bool(answer.strip())
    got = f"Got {quoted(str(answer))}" if given else "Got no answer"
    expected = f", expected {quoted(example.answer)}" if example.answer else ""
    return f"{got}{expected}. {_lesson(example.answer, str(answer), given, in_working)}"


def quoted(text: str) -> str:
    """A text in double quotes on one line, cut where it is long."""
    return json.dumps(text[:SHOWN_CHARS], ensure_ascii=False)


def _lesson(expected: str, answer: str, given: bool, in_working: bool) -> str:
    bare, wanted = ("".join(re.findall(r"\w", text)).lower() for text in (answer, expected))
    if not given:
        return "Always state a final answer, even when the working is unsure."
    if wanted and bare == wanted:
        return "Keep to the case, the spaces and the punctuation of the form that the question asks for."
    if expected and place(answer, expected):
        return "Leave out every word, label and unit that is not part of the answer itself."
    if in_working:
        return "Copy the result of the working into the answer unchanged."
    return "The result itself is wrong: check each step, and whether every condition of the question is met."


def explain_working(example: dspy.Example, score: float) -> str:
    """Feedback on the working, with the reference answer in quotes where there is one."""
    if score == 1.0:
        return "Right."
    reach = f"The working should reach {quoted(example.answer)}. " if example.answer else ""
    if score == 0.5:
        return f"{reach}Repeat the result alone on the last line of the working."
    return f"{reach}Write out every step in order, check each against the question, and end with the result alone."


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """The data set's own score of the answer.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: `solve`: the grade of the working and feedback on it; `answer`: the same score as the program's.
            None: the program's score and all feedback.
        pred_trace: Not used.
    """
    working, answer = getattr(prediction, "working", None), getattr(prediction, "answer", None)
    score = grade_answer(example, answer)

    def judge(name: str) -> tuple[float, str]:
        if name == "solve":
            worked = grade_working(example, working, answer)
            return worked, explain_working(example, worked)
        in_working = bool(example.answer) and place(working, example.answer) > 0
        return score, explain_answer(example, answer, score, in_working)

    return by_predictor(pred_name, ("solve", "answer"), judge, score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for a model of 8B parameters on one GPU of 80 GB. Untested at that size."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values(
        {
            "fast.anchor_size": 48,
            "fast.max_rollouts": 768,
            "rollout.batch_size": 32,
            "rollout.group_size": 8,
            "rollout.timeout_s": 300.0,
            "train.lr": 4e-5,
            "train.kl_coef": 0.001,
            "train.microbatch_tokens": 16384,
            "train.gradient_checkpointing": True,
            "eval.max_examples": 128,
            "budget.max_cycles": 20,
        }
    )
