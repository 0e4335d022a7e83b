"""Math: problems with one final answer, checked by math-verify, for a program that solves and then states the answer.

Without a variant the problems are made from the families in `problems.py`; with the variant `real` they are read from
a data set in the schema of Polaris (`problem`, `answer`, `difficulty`).
"""

import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.sandbox import Sandbox, Stopped
from fst_optimizer.task_kit import by_predictor, checked_size, distinct, numbered

from .problems import FAMILIES

if TYPE_CHECKING:
    from fst_optimizer import FSTConfig

DATA_VARIABLE = "FST_MATH_DATA"
"""Environment variable that names the data of the variant `real`: a file, a folder, or a name on the model hub."""
DEFAULT_VARIANT = "all"
SPLITS = {"train": range(2, 10), "val": (0,), "test": (1,)}
"""Which tenths of all problems, told apart by their hash, belong to a split."""
SIZES = {"train": 512, "val": 128, "test": 256}
LARGEST_SIZE = 4096
PATIENCE = 2000
"""Problems made in a row that bring no new one of a split, after which it is taken to have no more."""
SOLUTION_TOKENS, FINISH_TOKENS = 3072, 256
"""Of one completion."""
CHECK_CPU_S = 5.0
"""Processor time for the check of one answer, in seconds; what takes longer is wrong."""
UNBOXED, FORM = 0.5, 0.1
"""The score of the right value in a wrong form, and of a wrong value in the right form."""
SHOWN_CHARS = 300
"""Of an answer, in feedback."""

SOLVE = "Solve the problem step by step."
FINISH = "Check the result against the problem, then state the final answer alone, inside \\boxed{}."

_sandbox = Sandbox(Path(__file__).parent / "checker.py")


@dataclass(frozen=True)
class Variant:
    """Where the problems come from."""

    families: tuple[str, ...] = ()
    """Names in `FAMILIES`; none for real data."""
    easiest: float | None = None
    """Real data: the highest pass rate to keep. None: no limit."""
    hardest: float | None = None
    """Real data: the lowest pass rate to keep."""


class MathProgram(dspy.Module):  # type: ignore[misc]
    """`solve` reasons and gives a result, `finish` checks it and states the answer."""

    def __init__(self) -> None:
        """A `dspy.ChainOfThought` (its predictor's name is `solve.predict`) and a `dspy.Predict`."""
        super().__init__()
        self.solve = dspy.ChainOfThought(dspy.Signature("problem -> result", SOLVE), max_tokens=SOLUTION_TOKENS)
        self.finish = dspy.Predict(
            dspy.Signature("problem, reasoning, result -> answer", FINISH), max_tokens=FINISH_TOKENS
        )

    def forward(self, problem: str) -> dspy.Prediction:
        """The prediction has `reasoning`, `result` and `answer`."""
        solved = self.solve(problem=problem)
        answer = self.finish(problem=problem, reasoning=solved.reasoning, result=solved.result).answer
        return dspy.Prediction(reasoning=solved.reasoning, result=solved.result, answer=answer)


def variant_named(variant: str | None) -> Variant:
    """What a variant names: `all`, one family, or `real` with limits on the pass rate (`real,min=0.2,max=0.8`).

    Raises:
        ValueError: There is no such variant, or math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("answers are checked by the package math-verify; run `pip install math-verify`")
    name, *limits = (variant or DEFAULT_VARIANT).split(",")
    if name == "real":
        return Variant((), **_limits(limits))
    if name not in (*FAMILIES, DEFAULT_VARIANT):
        raise ValueError(f"unknown variant {name!r} of math; choose one of all, real, {', '.join(FAMILIES)}")
    if limits:
        raise ValueError(f"variant {variant!r}: only real data has a difficulty; leave {','.join(limits)} away")
    return Variant(tuple(FAMILIES) if name == DEFAULT_VARIANT else (name,))


def _limits(pairs: list[str]) -> dict[str, float]:
    fields = {"min": "hardest", "max": "easiest"}
    limits = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in fields or not re.fullmatch(r"0?\.\d+|[01](\.0*)?", text):
            raise ValueError(f"limit {pair!r} of variant real is not min=RATE or max=RATE with a rate from 0 to 1")
        limits[fields[name]] = float(text)
    return limits


def build_program(variant: str | None = None) -> MathProgram:
    """The seed program, the same for every variant; no LM attached."""
    variant_named(variant)
    return MathProgram()


def split_of(problem: str) -> str:
    """The split that a problem belongs to, decided by its hash alone, so that no problem is in two splits."""
    tenth = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:4]) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def load(split: str, size: int | None = None, seed: int = 0, variant: str | None = None) -> list[dspy.Example]:
    """Examples of a split, the same for the same arguments; a smaller size gives the first ones of a larger.

    Args:
        split: `train`, `val` or `test`.
        size: How many; None means the split's default size, or as many as a smaller set of real data has.
        seed: Draws other problems of the same split.
        variant: Where they come from; None means all families.

    Raises:
        ValueError: A wrong argument, no data, or fewer problems than asked for.
    """
    wanted = checked_size(split, size, SIZES, LARGEST_SIZE)
    task = variant_named(variant)
    rows = _made(task, split, wanted, seed) if task.families else _real(task, split, size, seed)
    return numbered(split, seed, rows, "problem")


def _made(task: Variant, split: str, size: int, seed: int) -> list[dict[str, str]]:
    """Problems with their answer and source; the families take turns at random."""
    rng = random.Random(f"math/{','.join(task.families)}/{split}/{seed}")

    def draws() -> Iterator[tuple[str | None, dict[str, str]]]:
        while True:
            family = rng.choice(task.families)
            problem, answer = FAMILIES[family].draw(rng)
            own = split_of(problem) == split
            yield problem if own else None, {"problem": problem, "answer": answer, "source": f"made/{family}"}

    rows = distinct(draws(), size, PATIENCE)
    if len(rows) < size:
        raise ValueError(
            f"family {', '.join(task.families)!r} has only {len(rows)} distinct problems in its {split} split, "
            f"not {size}; ask for at most {len(rows)}, or for all families"
        )
    return rows


def _real(task: Variant, split: str, size: int | None, seed: int) -> list[dict[str, str]]:
    """Rows of a data set in a seeded order; a problem that comes twice counts once."""
    rows = {row["problem"]: row for row in _rows() if _wanted(row, task)}
    own = [
        {"problem": problem, "answer": row["answer"], "source": "real"}
        for problem, row in rows.items()
        if split_of(problem) == split
    ]
    random.Random(f"math/real/{split}/{seed}").shuffle(own)
    if len(own) < (1 if size is None else size):
        raise ValueError(
            f"{DATA_VARIABLE}={os.environ.get(DATA_VARIABLE)!r} has {len(own)} problems in its {split} split that fit "
            f"the variant, not {size or 'any'}; ask for fewer, or widen min and max"
        )
    return own[: SIZES[split] if size is None else size]


def _rows() -> list[dict[str, Any]]:
    """All rows of the real data, problem and answer as text."""
    place = os.environ.get(DATA_VARIABLE, "")
    if not place:
        raise ValueError(
            f"variant real reads the data that {DATA_VARIABLE} names: set it to a JSON-lines, Parquet or CSV file, a "
            "folder, or a name on the hub, with the columns problem and answer"
        )
    return [
        {**row, "problem": str(row["problem"]).strip(), "answer": str(row["answer"]).strip()} for row in _dataset(place)
    ]


@lru_cache(maxsize=1)
def _dataset(place: str) -> Any:
    import datasets

    path = Path(place)
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise ValueError(f"the file's suffix is {path.suffix!r}, not one of {', '.join(kinds)}")
            data = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        elif path.is_dir() and (path / "state.json").is_file():
            data = datasets.load_from_disk(str(path))
        elif path.is_dir() or not path.is_absolute():
            data = datasets.load_dataset(place, split="train")
        else:
            raise ValueError("there is no such file or folder")
    except Exception as error:
        raise ValueError(
            f"{DATA_VARIABLE}={place!r} could not be loaded: {error}; give a file, a folder or a name on the hub"
        ) from error
    missing = [column for column in ("problem", "answer") if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{DATA_VARIABLE}={place!r} has no column {' and '.join(missing)}, only {', '.join(data.column_names)}; "
            "rename its columns"
        )
    return data


def _wanted(row: dict[str, Any], task: Variant) -> bool:
    """Whether a row has an answer, and a pass rate within the limits."""
    if not row["problem"] or not row["answer"]:
        return False
    if task.easiest is None and task.hardest is None:
        return True
    rate = pass_rate(row.get("difficulty"))
    return (task.hardest is None or rate >= task.hardest) and (task.easiest is None or rate <= task.easiest)


def pass_rate(difficulty: object) -> float:
    """A difficulty as a share: Polaris writes how many of the attempts of a 7B model were right, as text (`3/8`).

    Raises ValueError for anything but such a text or a number from 0 to 1.
    """
    try:
        right, _, tries = str(difficulty).partition("/")
        rate = float(right) / float(tries or 1)
    except (ValueError, ZeroDivisionError):
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ValueError(
            f"difficulty {difficulty!r} is neither a share like '3/8' nor a number from 0 to 1; "
            "leave min and max away, or mend the data"
        )
    return rate


def reference(example: dspy.Example) -> dspy.Prediction:
    """What the program should return."""
    answer = example.answer if "\\boxed" in example.answer else f"\\boxed{{{example.answer.strip('$')}}}"
    return dspy.Prediction(reasoning="So it is.", result=example.answer, answer=answer)


def is_alone(answer: str) -> bool:
    r"""Whether a text is one `\boxed{...}` and nothing else; dollar signs, brackets of LaTeX and a period may stand."""
    text = answer.strip().removesuffix(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = text[len(opening) : -len(closing)].strip()
            break
    text = text.removesuffix(".").strip()
    if not text.startswith("\\boxed{") or text.count("\\boxed") != 1:
        return False
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark == "{") - (mark == "}")
        if depth == 0 and mark == "}":
            return place == len(text) - 1
    return False


@lru_cache(maxsize=8192)
def _judge(expected: str, answer: str) -> dict[str, bool]:
    try:
        verdict: dict[str, bool] = _sandbox.call("judge", cpu_s=CHECK_CPU_S, expected=expected, answer=answer)
    except Stopped:
        return {"equal": False, "parsed": False, "near": False}
    return verdict


def verdict_on(expected: str, answer: object) -> dict[str, bool]:
    """math-verify's verdict (see `checker.judge`); anything but text, and what it cannot check in time, is wrong."""
    return _judge(expected, answer if isinstance(answer, str) else "")


def grade_answer(expected: str, answer: object) -> float:
    """1.0 for the right value alone in a box, `UNBOXED` for it in another form, `FORM` for a wrong one in that form."""
    verdict = verdict_on(expected, answer)
    alone = isinstance(answer, str) and is_alone(answer)
    if verdict["equal"]:
        return 1.0 if alone else UNBOXED
    return FORM if alone and verdict["parsed"] else 0.0


def grade_result(expected: str, result: object) -> float:
    """1.0 for the right value, in a box or not; `FORM` for another that can be read."""
    verdict = verdict_on(expected, result)
    return 1.0 if verdict["equal"] else FORM if verdict["parsed"] else 0.0


def explain(example: dspy.Example, got: object, score: float, *, result: object = None) -> str:
    """Feedback: what was got and expected, in quotes, then sentences that name nothing of the problem.

    Args:
        example: The example.
        got: The answer of `finish`, or the result of `solve`.
        score: Its grade.
        result: For `finish`: the result that it was given.
    """
    if score == 1.0:
        return "Right."
    text = " ".join(got.split())[:SHOWN_CHARS] if isinstance(got, str) else ""
    shown = f'Got "{text}"' if text else "Got nothing"
    lessons = _lessons(example, got, score, result)
    return f'{shown}, expected "{example.answer}". {" ".join(lessons)}'


def _lessons(example: dspy.Example, got: object, score: float, result: object) -> list[str]:
    if score == UNBOXED:
        return ["Write the final answer alone in one boxed command of LaTeX, without words or units around it."]
    verdict = verdict_on(example.answer, got)
    if result is not None and verdict_on(example.answer, result)["equal"]:
        return ["Copy a result that the check confirms into the box unchanged."]
    if not verdict["parsed"]:
        return ["Give one short expression in LaTeX, worked out as far as it goes, and nothing else."]
    if verdict["near"]:
        return ["Give exact values, as fractions, roots or multiples of pi, and never rounded decimals."]
    hint = FAMILIES[example.source.removeprefix("made/")].hint if example.source.startswith("made/") else ""
    general = "The value is wrong: check every step, and test the result against each condition of the problem."
    return [general, hint] if hint else [general]


def metric(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """The grade of the final answer.

    Args:
        example: One from `load`.
        prediction: The program's prediction; missing fields count as wrong.
        trace: Not used.
        pred_name: `solve.predict`: the grade of its result, which needs no box; `finish`: the same grade as the
            program's; each with feedback of its own. None: the program's score and all feedback.
        pred_trace: Not used.
    """
    result, answer = getattr(prediction, "result", None), getattr(prediction, "answer", None)
    score = grade_answer(example.answer, answer)

    def judge(name: str) -> tuple[float, str]:
        if name == "finish":
            return score, explain(example, answer, score, result=result)
        solved = grade_result(example.answer, result)
        return solved, explain(example, result, solved)

    return by_predictor(pred_name, ("solve.predict", "finish"), judge, score)


def config(variant: str | None = None) -> "FSTConfig":
    """Settings for a model of 8B parameters on one GPU of 80 GB. Untested at that size."""
    from fst_optimizer import FSTConfig

    return FSTConfig().with_values(
        {
            "fast.anchor_size": 48,
            "fast.max_rollouts": 768,
            "rollout.batch_size": 32,
            "rollout.group_size": 8,
            "rollout.timeout_s": 600.0,
            "train.lr": 4e-5,
            "train.kl_coef": 0.001,
            "train.microbatch_tokens": 16384,
            "train.gradient_checkpointing": True,
            "eval.max_examples": 128,
            "budget.max_cycles": 30,
        }
    )
