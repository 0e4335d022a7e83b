"""CodeIO: predict what a small Python program returns.

The programs are composed here from families of functions and really run when the data is made. A predictor follows
the run, another gives the output. A variant is a level: `easy`, `medium` or `hard`.
"""

import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.task_kit import by_predictor, checked_size, distinct, named, numbered, split_by_hash

from .compose import LEVELS, Level, draw, solve
from .naming import followed
from .outputs import Parsed, difference, likeness, parse

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

SEED_INSTRUCTIONS = {
    "trace": "Follow what the code does with the arguments of `main`.",
    "answer": "Give what `main` returns for the arguments, as JSON.",
}
MAX_TOKENS = {"trace": 1536, "answer": 256}
"""Of one answer. All values of a hard run are up to about 900 characters, an output at most 140."""
SIZES = {"train": 1024, "val": 256, "test": 512}
LARGEST_SIZE = 8192
DEFAULT_VARIANT = "medium"

TYPE_SHARE, LIKENESS_SHARE = 0.05, 0.4
"""What a wrong output earns at most: for its type, and for the parts that are right."""

FORMAT = "Write the output as JSON and nothing else, with strings in double quotes."
TYPE = "Keep the type that the code gives: whole numbers, decimals, booleans, strings, lists and objects all differ."
LENGTH = "Count how many elements the code puts into the result."
FOLLOW = "Run the code statement by statement, and carry every changed value into the next one."
NAME = "Write down every new value in order: in each turn of a loop, and what each function returns."
STRAY = "Leave out numbers that the run does not make."


class TraceThenAnswer(dspy.Module):  # type: ignore[misc]
    """A predictor that follows the run, and one that gives the output with those steps before it."""

    def __init__(self) -> None:
        """Builds both with their seed instructions."""
        super().__init__()
        trace = dspy.Signature("code, arguments -> steps", SEED_INSTRUCTIONS["trace"])
        answer = dspy.Signature("code, arguments, steps -> output", SEED_INSTRUCTIONS["answer"])
        self.trace = dspy.Predict(trace, max_tokens=MAX_TOKENS["trace"])
        self.answer = dspy.Predict(answer, max_tokens=MAX_TOKENS["answer"])

    def forward(self, code: str, arguments: str) -> dspy.Prediction:
        """Traces, then answers; the prediction carries the steps, so that the metric can grade them."""
        steps = self.trace(code=code, arguments=arguments).steps
        output = self.answer(code=code, arguments=arguments, steps=steps).output
        return dspy.Prediction(steps=steps, output=output)


def level_named(variant: str | None) -> Level:
    """The level of that name, the default one for None. Raises ValueError for an unknown name."""
    return named("codeio", LEVELS, variant or DEFAULT_VARIANT)


def build_program(variant: str | None = None) -> TraceThenAnswer:
    """The seed program, the same for every level: general instructions, no LM attached."""
    level_named(variant)
    return TraceThenAnswer()


# --- Data ------------------------------------------------------------------------------------------------------------


def split_of(code: str, arguments: str) -> str:
    """The split that an example belongs to, decided by its hash alone, so that none is in two splits."""
    return split_by_hash(f"{code}\n{arguments}")


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size.
        seed: Draws other programs of the same split.
        variant: The level; None means the default one.
    """
    size = checked_size(split, size, SIZES, LARGEST_SIZE)
    level, name = level_named(variant), variant or DEFAULT_VARIANT
    rng = random.Random(f"codeio/{name}/{split}/{seed}")

    def draws() -> Iterator[tuple[str | None, dict[str, Any]]]:
        while True:
            program = draw(rng, level)
            code, arguments = program.code, json.dumps(program.arguments)
            if split_of(code, arguments) == split and (solved := solve(program, level)):
                row = {"code": code, "arguments": arguments, "output": json.dumps(solved.output)}
                yield f"{code}\n{arguments}", {**row, "states": solved.states, "variant": name}

    return numbered(split, seed, distinct(draws(), size), "code", "arguments")


def reference(example: dspy.Example) -> dspy.Prediction:
    """The right answer, as the program would return it: the values of the run in order, and the output."""
    return dspy.Prediction(steps="\n".join(example.states), output=example.output)


# --- Metric ----------------------------------------------------------------------------------------------------------


def grade(answer: object, expected: Any) -> float:
    """1.0 for the same value in the same types, else at most 0.45.

    A wrong output of the right type is 0.05, and 0.4 times its likeness, as `outputs.likeness` has it. One that is no
    JSON is 0, but for a string that lacks its quotes: that is 0.4 times the likeness, 0.4 at most.
    """
    parsed = parse(answer)
    if parsed is None:
        bare = isinstance(answer, str) and isinstance(expected, str)
        return LIKENESS_SHARE * likeness(answer.strip(), expected) if bare else 0.0  # type: ignore[attr-defined]
    if difference(parsed.value, expected) is None:
        return 1.0
    typed = type(parsed.value) is type(expected)
    return TYPE_SHARE * typed + LIKENESS_SHARE * likeness(parsed.value, expected)


def explain(answer: object, expected: Any) -> str:
    """Feedback on an output: what was got and expected and where they part, quoted, then what to do, in general."""
    right = _quoted(json.dumps(expected))
    if not isinstance(answer, str) or not answer.strip():
        return f"Got no output, expected {right}. {FORMAT}"
    parsed = parse(answer)
    if parsed is None:
        return f"Got {_quoted(answer)}, which is no JSON, expected {right}. {FORMAT}"
    return _explain_value(answer, parsed, expected)


def _explain_value(answer: str, parsed: Parsed, expected: Any) -> str:
    found = difference(parsed.value, expected)
    if found is None:
        return "Right."
    parts = [f"Got {_quoted(answer)}, expected {_quoted(json.dumps(expected))}."]
    if found.place:
        one, other = (_quoted(text) if text else "nothing" for text in (found.got, found.expected))
        parts.append(f"They first differ at {_quoted(found.place)}: {one} for {other}.")
    if found.of_type:
        parts.append(TYPE)
    elif not (found.got and found.expected):
        parts.append(LENGTH)
    return " ".join([*parts, FOLLOW])


def explain_steps(missing: tuple[str, ...], strays: bool, most: int = 6) -> str:
    """Feedback on a trace: the first of the values that it lacks, quoted, then what to do, in general."""
    parts = []
    if missing:
        shown = ", ".join(_quoted(value) for value in missing[:most])
        parts.append(f"The run also makes {shown}{' and more' if len(missing) > most else ''}. {NAME}")
    if strays:
        parts.append(STRAY)
    return " ".join(parts) or "Right."


def _quoted(text: str, most: int = 200) -> str:
    """On one line, cut, and in backticks, because JSON has double quotes inside."""
    line = " ".join(text.replace("`", "").split())
    return f"`{line[:most]}{'...' if len(line) > most else ''}`"


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """Grades the output, and by `pred_name` the trace: by the share of the run's values that its steps name.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: A predictor's name: its own score and feedback. None: the output's score and all feedback.
        pred_trace: Not used.
    """
    answer, expected = getattr(prediction, "output", None), json.loads(example.output)
    score, steps = grade(answer, expected), getattr(prediction, "steps", None)

    def judge(name: str) -> tuple[float, str]:
        if name == "answer":
            return score, explain(answer, expected)
        shown = f"{example.code}\n{example.arguments}"
        share, missing, strays = followed(steps if isinstance(steps, str) else "", example.states, shown)
        return share, explain_steps(missing, strays)

    return by_predictor(pred_name, SEED_INSTRUCTIONS, judge, score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for a model of 8B parameters on one GPU of 80 GB. Untested.

    Group, cap, KL weight and fast budget are the paper's; the learning rate is a guess for LoRA.
    """
    from fst_optimizer import FSTConfig

    level_named(variant)
    return FSTConfig().with_values(
        {
            "fast.anchor_size": 64,
            "fast.max_rollouts": 960,
            "rollout.batch_size": 32,
            "rollout.group_size": 8,
            "train.lr": 4e-5,
            "train.kl_coef": 0.001,
            "train.microbatch_tokens": 16384,
            "train.gradient_checkpointing": True,
            "eval.max_examples": 128,
            "budget.max_cycles": 30,
        }
    )
