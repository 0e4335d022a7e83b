"""Draws from reasoning-gym's data sets and scores answers. Runs in the helper process of `fst_optimizer.sandbox`."""

import ast
import difflib
import json
import re
import sys
from functools import lru_cache
from typing import Any

import reasoning_gym  # type: ignore[import-untyped, unused-ignore]
from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped, unused-ignore]

Settings = dict[str, Any]

REFUSED = {
    "composite": "it is a mixture that needs a list of other data sets; name one of those",
    "game_of_life_halting": "its own scorer gives 1.0 to any text at all",
}
"""Data sets that no program can be trained on, and why."""
REFERENCES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
"""Where data sets with many right answers, which name none in `answer`, keep one in their metadata."""
RUN_AS_CODE = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Data sets whose scorer runs the answer as Python code, to see whether it is a list."""
SYMBOLIC = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
"""Data sets whose scorer gives the answer to sympy's parser, which runs it as code as well."""
FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
    | {"exp", "log", "ln", "sqrt", "Abs", "pi", "Rational"}
)
"""Names of more than one letter that such an answer may use."""


def check(name: str, settings: Settings) -> None:
    """Raises ValueError unless there is such a data set that takes these settings."""
    _dataset(name, json.dumps(settings), 0, 1)


def draw(name: str, settings: Settings, seed: int, size: int) -> list[dict[str, str]]:
    """The entries of the data set of that seed and size, without those whose own answer does not count as one.

    (`intermediate_integration` answers some of its questions with the unsolved integral, which its scorer accepts.)

    Returns:
        For each entry its `question`, its `answer` ("" where none is named) and the whole `entry` as a literal.
    """
    dataset = _dataset(name, json.dumps(settings), seed, size)
    try:
        entries = [dataset[index] for index in range(size)]
    except Exception as error:
        raise ValueError(
            f"drawing from data set {name!r} failed with the settings {settings}: {error!r}; give others"
        ) from error
    drawn = [
        {"question": str(entry["question"]), "answer": _reference(name, entry), "entry": repr(_plain(entry))}
        for entry in entries
    ]
    return [entry for entry in drawn if name not in SYMBOLIC or is_expression(entry["answer"])]


def score(name: str, settings: Settings, entry: str, answer: str) -> float:
    """The data set's own score of an answer, from 0 to 1. What its scorer cannot read, or must not run, is 0."""
    dataset = _dataset(name, json.dumps(settings), 0, 1)
    if name in SYMBOLIC and not is_expression(answer):
        return 0.0
    try:
        return min(1.0, max(0.0, float(dataset.score_answer(answer, ast.literal_eval(entry)))))
    except Exception:  # some scorers do not expect all that a model may write
        return 0.0


def is_expression(answer: str) -> bool:
    """Whether a text is arithmetic or algebra only: symbols of one letter, numbers, operators, known functions."""
    names = re.findall(r"[^\W\d]\w*", answer)
    plain = re.fullmatch(r"[\w\s+\-*/^().,]*", answer) and not re.search(r"\.\s*[^\W\d]|__", answer)
    return bool(plain) and all(len(name) == 1 or name in FUNCTIONS for name in names)


@lru_cache(maxsize=8)
def _dataset(name: str, settings_json: str, seed: int, size: int) -> Any:
    if name not in DATASETS:
        near = difflib.get_close_matches(name, sorted(DATASETS), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "its documentation lists them"
        raise ValueError(f"reasoning-gym has no data set {name!r}; {hint}")
    if name in REFUSED:
        raise ValueError(f"data set {name!r} is of no use as a task: {REFUSED[name]}")
    kind, config = DATASETS[name]
    if name in RUN_AS_CODE:
        vars(sys.modules[kind.__module__])["eval"] = ast.literal_eval
    settings = _fitting(name, config, json.loads(settings_json))
    try:
        return reasoning_gym.create_dataset(name, **settings, seed=seed, size=size)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"data set {name!r} does not take the settings {settings}: {why}") from error


def _fitting(name: str, config: Any, settings: Settings) -> Settings:
    """The settings, with JSON's lists as tuples where the data set's default is one."""
    known = {field: value for field, value in vars(config()).items() if field not in ("seed", "size")}
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(known)}"
            raise ValueError(f"data set {name!r} has no setting {setting!r}; {hint}")
    return {
        setting: tuple(value) if isinstance(known[setting], tuple) and isinstance(value, list) else value
        for setting, value in settings.items()
    }


def _reference(name: str, entry: dict[str, Any]) -> str:
    answer = entry["metadata"][REFERENCES[name]] if name in REFERENCES else entry["answer"]
    if isinstance(answer, dict):
        return json.dumps(answer)
    return "" if answer is None else str(answer)


def _plain(value: Any) -> Any:
    """The value with nothing in it that is not a Python literal: numpy's kinds become Python's, the rest text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = set if isinstance(value, frozenset) else type(value)
        return kind(_plain(item) for item in value) if kind in (list, tuple, set) else [_plain(item) for item in value]
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
