"""Between DSPy programs and GEPA: texts in and out of a program, rollouts as GEPA's trajectories.

DSPy's own GEPA adapter runs programs itself; this one leaves that to the collector and only translates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gepa.core.adapter import EvaluationBatch

from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.plain import plain_data
from fst_optimizer.types import Item, Rollout, Texts, TraceStep

if TYPE_CHECKING:
    import dspy

Entry = dict[str, Any]
"""One example to reflect on. `Inputs`, `Generated Outputs` and `Feedback` are what GEPA's prompt shows. `Score` is
this component's, `Metric Feedback` the metric's own words and `Instance` the example's labels as text: the
extractive reflector reads them."""


@dataclass(frozen=True)
class Seen:
    """A rollout with the example it ran on: what GEPA calls a trajectory."""

    item: Item
    rollout: Rollout


class Bridge:
    """The adapter object that GEPA asks: `run(texts, items)` executes rollouts, or finds them among those that ran."""

    propose_new_texts = None
    """Must be None: GEPA would call it in place of our reflector."""

    def __init__(self, run: Callable[[Texts, Sequence[Item]], Sequence[Rollout]]) -> None:
        """`run` returns one rollout per item, in the items' order, with trace and feedback captured."""
        self._run = run
        self.failure: Exception | None = None
        """What broke while a dataset was built. GEPA only logs it, so the round looks here and raises."""

    def evaluate(
        self, batch: list[Item], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Seen, Rollout]:
        """Scores and trajectories of one candidate on some items."""
        rollouts = list(self._run(candidate, batch))
        return EvaluationBatch(
            outputs=rollouts,
            scores=[rollout.score for rollout in rollouts],
            trajectories=[Seen(item, rollout) for item, rollout in zip(batch, rollouts, strict=True)],
        )

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: EvaluationBatch[Seen, Rollout], components_to_update: list[str]
    ) -> dict[str, list[Entry]]:
        """Per component, one entry for each rollout that reached it."""
        try:
            seen = eval_batch.trajectories or []
            return {name: reflective_entries(name, seen) for name in components_to_update}
        except Exception as error:
            self.failure = error
            raise


def reflective_entries(component: str, seen: Sequence[Seen]) -> list[Entry]:
    """What the reflector reads about one component. An example that came twice is told once."""
    unique = {one.item.id: one for one in seen}.values()
    return [entry for one in unique if (entry := _entry(component, one)) is not None]


def _entry(component: str, seen: Seen) -> Entry | None:
    rollout = seen.rollout
    step = _telling_step(component, rollout.trace)
    if step is None:
        return None
    score = rollout.predictor_scores.get(component, rollout.score)
    words = (rollout.feedback.get(component) or rollout.feedback.get("", "")).strip()
    return {
        "Inputs": {name: plain_data(value) for name, value in step.inputs.items()},
        "Generated Outputs": _outputs(step),
        "Feedback": _feedback(step, rollout, words, score),
        "Score": score,
        "Metric Feedback": words,
        "Instance": tuple(str(value) for value in seen.item.example.labels().values()),
    }


def _telling_step(component: str, trace: Sequence[TraceStep]) -> TraceStep | None:
    """The turn to reflect on: the first that failed to parse, else the last, which knows most."""
    steps = [step for step in trace if step.predictor == component]
    failed = [step for step in steps if step.outputs is None]
    return next(iter(failed or steps[-1:]), None)


def _outputs(step: TraceStep) -> Any:
    if step.outputs is not None:
        return {name: plain_data(value) for name, value in step.outputs.items()}
    return f"Could not be parsed into the output fields. The raw response was:\n```\n{step.completion}\n```"


def _feedback(step: TraceStep, rollout: Rollout, words: str, score: float) -> str:
    if step.outputs is None:
        problem = "The response could not be parsed, so it earned nothing."
        return "\n".join(part for part in (problem, rollout.error, words) if part)
    if words:
        return words
    failure = f"\nThe program then failed: {rollout.error}" if rollout.error else ""
    return f"This response got a score of {score:g}.{failure}"


def seed_texts(program: dspy.Module) -> dict[str, str]:
    """Component name -> instruction, for every predictor of the program."""
    return {name: predictor.signature.instructions for name, predictor in program.named_predictors()}


def apply_texts(program: dspy.Module, texts: Texts) -> dspy.Module:
    """A copy of the program with these instructions; demos stay, LMs are shared, the original is not touched.

    Raises UserError for a text whose component the program does not have, and for a program that cannot be copied.
    """
    fresh = _copy(program)
    predictors = dict(fresh.named_predictors())
    for name, text in texts.items():
        if name not in predictors:
            raise UserError(f"the program has no predictor {name!r}; {did_you_mean(name, predictors)}")
        predictors[name].signature = predictors[name].signature.with_instructions(text)
    return fresh


def _copy(program: dspy.Module) -> dspy.Module:
    """A deep copy that shares the LMs, and whatever else cannot be copied (locks, clients).

    `Module.deepcopy` copies LMs, engine included, and shares a whole list of predictors when one attribute in it
    resists: setting an instruction on the copy would then change the original.
    """
    from dspy import BaseLM

    shared = {id(lm): lm for _, lm in program.named_sub_modules(type_=BaseLM)}
    try:
        return copy.deepcopy(program, dict(shared))
    except Exception:
        stubborn = {id(value): value for value in _leaves(program) if not _copies(value, shared)}
    try:
        return copy.deepcopy(program, shared | stubborn)
    except Exception as error:
        raise UserError(f"the student {type(program).__name__} cannot be copied: {error}") from error


def _leaves(program: dspy.Module) -> Iterator[Any]:
    """Every attribute of every module in the program that is neither a module nor a container."""
    import dspy

    waiting = [value for _, module in program.named_sub_modules() for value in vars(module).values()]
    met: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, dspy.Module) or id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        else:
            yield value


def _copies(value: Any, shared: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:
        return False
    return True
