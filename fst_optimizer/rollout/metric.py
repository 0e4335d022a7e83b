"""The user's metric, called one way: two arguments or five, a number or a Prediction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from fst_optimizer.errors import MetricError, UserError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.keys import without_keys, without_secrets
from fst_optimizer.rollout.outcome import raise_ctrl_c, raised_by, words_of
from fst_optimizer.text import shown, unicode_only
from fst_optimizer.types import Item


@dataclass(frozen=True)
class Judgement:
    """What the metric said of one prediction."""

    score: float
    feedback: str = ""


class Metric:
    """Wraps a metric of DSPy's two-argument kind or GEPA's five-argument kind.

    Raises:
        UserError: `function` cannot be called with two or five arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise UserError(f"metric is {function!r}: give a function of (example, prediction)")
        self.function = function
        self.per_predictor = _accepts(function, 5)
        if not self.per_predictor and not _accepts(function, 2):
            raise UserError(
                f"{_name(function)} takes neither two arguments (example, prediction) nor five "
                "(example, prediction, trace, pred_name, pred_trace); change its signature"
            )

    def judge(
        self, item: Item, prediction: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
    ) -> Judgement:
        """Score one prediction; with `pred_name`, give this predictor's own score and feedback.

        Raises:
            MetricError: The metric raised, or what it returned does when it is read.
            UserError: It returned something that is not a finite number.
        """
        name = _name(self.function)
        arguments = (trace, pred_name, pred_trace) if self.per_predictor else ()
        try:
            answer = failpoint("metric.answer", self.function(item.example, prediction, *arguments))
        except BaseException as error:  # sys.exit() in a metric must not end the run, as a success at that
            raise_ctrl_c(error)
            what = words_of(error) if isinstance(error, SystemExit) else without_secrets(shown(error, 1000))
            place = f" (at {raised_by(error).place})" if error.__traceback__ else ""
            raise MetricError(f"{name} raised on example {item.id}: {what}{place}{_unlike(prediction)}") from error
        try:
            score, feedback = _read(answer)
        except BaseException as error:  # of a property, a __float__ or a __str__ of the answer
            raise_ctrl_c(error)
            raise MetricError(
                f"{name} returned {shown(answer)} on example {item.id}, which raises when it is read: {shown(error)}"
            ) from error
        if not math.isfinite(score):
            raise UserError(
                f"{name} returned {shown(answer)} on example {item.id}: "
                "return a finite number, or dspy.Prediction(score=..., feedback=...)"
            )
        return Judgement(score, feedback)


def _read(answer: Any) -> tuple[float, str]:
    """Score and feedback of what a metric returned; the score is NaN where it is no number."""
    if isinstance(answer, dict):
        value, words = answer.get("score"), answer.get("feedback")
    else:
        value, words = getattr(answer, "score", answer), getattr(answer, "feedback", None)
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    return score, without_keys(unicode_only(str(words))) if words else ""


def _accepts(function: Callable[..., Any], count: int) -> bool:
    # A dspy module's __call__ takes anything and hands it to forward: SemanticF1 and its like take two arguments.
    own = getattr(function, "forward", function)
    try:
        inspect.signature(own).bind(*([None] * count))
    except TypeError:
        return False
    except ValueError:
        return count == 2  # a builtin without a signature: take it at its word
    return True


def _name(function: Callable[..., Any]) -> str:
    name = str(getattr(function, "__name__", type(function).__name__))
    return "the metric" if name == "metric" else f"metric {name}"


def _unlike(prediction: Any) -> str:
    """What metrics trip over most: a program that returned something else than a prediction."""
    if isinstance(prediction, dspy.Prediction | Mapping):
        return ""
    return f"; the program returned {shown(prediction)}: let forward return dspy.Prediction(...)"
