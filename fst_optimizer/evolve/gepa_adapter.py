"""Between DSPy programs and GEPA: texts in and out of a program, rollouts as GEPA's trajectories.

DSPy's own GEPA adapter runs programs itself; this one leaves that to the collector and only translates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gepa.core.adapter import EvaluationBatch

from fst_optimizer.text import plain_data
from fst_optimizer.types import Item, Rollout, Texts, TraceStep

Entry = dict[str, Any]
"""One example to reflect on. `Inputs`, `Generated Outputs` and `Feedback` are what GEPA's prompt shows. `Score` is
this component's, `Metric Feedback` the metric's own words and `Instance` the example's labels as text: the
extractive reflector reads them."""


@dataclass(frozen=True)
class Trajectory:
    """A rollout with the example it ran on: what GEPA calls a trajectory."""

    item: Item
    rollout: Rollout


class GepaAdapter:
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
    ) -> EvaluationBatch[Trajectory, Rollout]:
        """Scores and trajectories of one candidate on some items."""
        rollouts = list(self._run(candidate, batch))
        return EvaluationBatch(
            outputs=rollouts,
            scores=[rollout.score for rollout in rollouts],
            trajectories=[Trajectory(item, rollout) for item, rollout in zip(batch, rollouts, strict=True)],
        )

    def make_reflective_dataset(
        self,
        candidate: dict[str, str],
        eval_batch: EvaluationBatch[Trajectory, Rollout],
        components_to_update: list[str],
    ) -> dict[str, list[Entry]]:
        """Per component, one entry for each rollout that reached it."""
        try:
            seen = eval_batch.trajectories or []
            return {name: reflective_entries(name, seen) for name in components_to_update}
        except Exception as error:
            self.failure = error
            raise


def reflective_entries(component: str, seen: Sequence[Trajectory]) -> list[Entry]:
    """What the reflector reads about one component. An example that came twice is told once."""
    unique = {one.item.id: one for one in seen}.values()
    return [entry for one in unique if (entry := _entry(component, one)) is not None]


def _entry(component: str, seen: Trajectory) -> Entry | None:
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
