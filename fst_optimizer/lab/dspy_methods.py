"""DSPy's own optimizers on our policy, as methods of a comparison: `dspy-gepa`, `dspy-grpo`, `dspy-together`.

Each may run the program `budget.max_rollouts` times to learn; these runs are counted as they happen. Instructions are
written by the reflector that our methods have on the task, at most `fast.reflection_calls` times.

What differs: these optimizers do not use the validation set on the way, so they have no curve, and
`dspy-grpo` returns its last weights, not its best.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.evolve.reflect import PERFECT, Reflector
from fst_optimizer.lab.baseline import Learned, Start, main
from fst_optimizer.lab.methods import DSPY_METHODS
from fst_optimizer.run.state import ValidationScore

ANCHOR = 32
"""Training examples that GEPA scores every accepted candidate on: its Pareto set, within its budget."""


class RunCounter(BaseCallback):  # type: ignore[misc]
    """Counts how often a program is run, in any thread."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.count = 0
        self._lock = threading.Lock()

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """One run begins."""
        if type(instance) is self.kind:
            with self._lock:
                self.count += 1


def optimize(
    method: str,
    program: dspy.Module,
    metric: Callable[..., Any],
    train: Sequence[dspy.Example],
    config: FSTConfig,
    reflector: Reflector,
) -> dspy.Module:
    """One of DSPy's optimizers on the program, within `config.budget.max_rollouts` runs of it."""
    cap = config.budget.max_rollouts
    assert cap is not None, "a comparison always has a cap"
    if method == "dspy-gepa":
        return gepa(metric, cap, config, reflector).compile(program, trainset=list(train), valset=list(train[:ANCHOR]))
    if method == "dspy-grpo":
        return grpo(metric, cap, config).compile(program, trainset=list(train))
    # It scores its candidates on the anchor between its steps, so that no method sees the validation set while it
    # learns; those runs, and GEPA's last full evaluation, which passes its limit, count within the same cap.
    half = (cap - 8 * ANCHOR) // 2
    together = dspy.BetterTogether(
        metric=score_only(metric), p=gepa(metric, half, config, reflector), w=grpo(metric, half, config)
    )
    return together.compile(
        program,
        trainset=list(train),
        valset=list(train[:ANCHOR]),
        strategy="p -> w",
        num_threads=config.rollout.num_threads,
    )


def gepa(metric: Callable[..., Any], cap: int, config: FSTConfig, reflector: Reflector) -> dspy.GEPA:
    """DSPy's GEPA with the reflector of our methods as its proposer, so that both sides read and may ask the same.

    It stops once the reflections of the run are used up, as our search does; without a new text it would go on and
    rescore the old ones.
    """
    most = config.fast.reflection_calls
    return dspy.GEPA(
        metric=score_in_feedback(metric),
        max_metric_calls=cap,
        instruction_proposer=proposer(reflector, most),
        gepa_kwargs={} if most is None else {"stop_callbacks": lambda state: reflector.calls >= most},
        reflection_minibatch_size=config.fast.minibatch,
        num_threads=config.rollout.num_threads,
        seed=config.seed,
    )


def grpo(metric: Callable[..., Any], cap: int, config: FSTConfig) -> Any:
    """DSPy's GRPO with our batch, group and learning rate, and as many steps as the cap allows."""
    from dspy.teleprompt.grpo import GRPO

    rollout, train = config.rollout, config.train
    return GRPO(
        metric=score_only(metric),
        adapter=dspy.ChatAdapter(use_json_adapter_fallback=False),
        exclude_demos=True,
        num_threads=rollout.num_threads,
        num_train_steps=max(1, cap // (rollout.batch_size * rollout.group_size)),
        num_dspy_examples_per_grpo_step=rollout.batch_size,
        num_rollouts_per_grpo_step=rollout.group_size,
        seed=config.seed,
        # What an answer that cannot be parsed earns: dspy wants it below the score of a failure.
        failure_score=0.0,
        format_failure_score=-0.1,
        train_kwargs={
            "lr": train.lr,
            "loss": train.loss,
            "warmup_steps": train.warmup_steps,
            "kl_coef": train.kl_coef,
            "temperature": rollout.temperature,
        },
    )


def score_only(metric: Callable[..., Any]) -> Callable[..., float]:
    """The metric as a number, for optimizers that read no feedback."""

    def score(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        judged = metric(example, prediction)
        return float(getattr(judged, "score", judged))

    return score


def score_in_feedback(metric: Callable[..., Any]) -> Callable[..., Any]:
    """The metric with its score written before the feedback: GEPA hands proposers the words alone."""

    def judged(
        example: dspy.Example, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        found = metric(example, prediction, trace, pred_name, pred_trace)
        whole = metric(example, prediction, trace)
        return dspy.Prediction(score=float(whole.score), feedback=f"[{float(found.score):.6f}]\n{found.feedback}")

    return judged


def proposer(reflector: Reflector, most: int | None = None) -> Callable[..., dict[str, str]]:
    """The reflector as GEPA's proposer: new texts for the components that it has some for, the old ones for the others.

    It is asked where something failed, and at most `most` times (None: no limit), as by our own search.
    """

    def text(name: str, current: str, entries: Sequence[Mapping[str, Any]]) -> str:
        fails = any(entry["Score"] < PERFECT for entry in entries)
        asks = fails and (most is None or reflector.calls < most)
        return (reflector(name, current, entries) if asks else None) or current

    def propose(
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        entries = {name: [entry_of(one) for one in reflective_dataset.get(name, ())] for name in components_to_update}
        return {name: text(name, candidate[name], entries[name]) for name in entries}

    return propose


def entry_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """GEPA's entry as our reflector reads it; a failed parse has no score of ours and counts as 0."""
    said = str(given["Feedback"])
    match = re.match(r"\[(-?[\d.]+)\]\n", said)
    if match is None:  # GEPA's own words on what the answer should look like
        return {**given, "Feedback": said, "Metric Feedback": "", "Score": 0.0}
    words, score = said[match.end() :], float(match[1])
    shown = words or f"This response got a score of {score:g}."
    return {**given, "Feedback": shown, "Metric Feedback": words, "Score": score}


def learn(method: str, start: Start, before: ValidationScore) -> Learned:
    """Let one of DSPy's optimizers learn, and count the program runs that it takes."""
    counter = RunCounter(type(start.program))
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(callbacks=[counter], adapter=adapter, lm=start.policy.lm):
        better = optimize(method, start.program, start.task.metric, start.train, start.config, start.reflector)
    # dspy-together's runs are of both sides (its GEPA and its GRPO get half of the cap each), counted as slow.
    start.counts = start.counts.plus(**{"fast" if method == "dspy-gepa" else "slow": counter.count})
    steps = start.policy.version
    return Learned(better, start.validate(better, steps, cycle=1), steps)


if __name__ == "__main__":
    main(DSPY_METHODS, lambda method: partial(learn, method), __doc__)
