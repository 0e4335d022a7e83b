"""DSPy's own optimizers on our policy, as methods of a comparison: `dspy-gepa`, `dspy-grpo`, `dspy-together`.

Each starts from the same program, policy and data as our methods, may run the program `budget.max_rollouts` times to
learn, and leaves a directory that `fst lab compare` reads. Program runs are counted as they happen. The final program
is scored greedily on validation and test sets by the same code as ours.

What differs: these optimizers do not use the validation set on the way, so they have no curve, and
`dspy-grpo` returns its last weights, not its best.
"""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from fst_optimizer.children import end_with_parent
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.evolve.reflect import ExtractiveReflector
from fst_optimizer.finished.score import collector_of
from fst_optimizer.lab.methods import DSPY_METHODS
from fst_optimizer.program.lms import attach_policy, give_lm
from fst_optimizer.program.student import checked_student
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.run import record
from fst_optimizer.run.evaluate import evaluate, evaluate_pair
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.store.files import open_run, write_json
from fst_optimizer.store.metrics import MetricsLog, eval_fields
from fst_optimizer.task_run import RunRequest, Sizes, make_policy, plan_run
from fst_optimizer.types import Candidate, RolloutCounts, items_of

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
    method: str, program: dspy.Module, metric: Callable[..., Any], train: Sequence[dspy.Example], config: FSTConfig
) -> dspy.Module:
    """Let one of DSPy's optimizers learn, within `config.budget.max_rollouts` runs of the program."""
    cap = config.budget.max_rollouts
    assert cap is not None, "a comparison always has a cap"
    if method == "dspy-gepa":
        return gepa(metric, cap, config).compile(program, trainset=list(train), valset=list(train[:ANCHOR]))
    if method == "dspy-grpo":
        return grpo(metric, cap, config).compile(program, trainset=list(train))
    # It scores its candidates on the anchor between its steps, so that no method sees the validation set while it
    # learns; those runs, and GEPA's last full evaluation, which passes its limit, count within the same cap.
    half = (cap - 8 * ANCHOR) // 2
    together = dspy.BetterTogether(
        metric=score_only(metric), p=gepa(metric, half, config), w=grpo(metric, half, config)
    )
    return together.compile(
        program,
        trainset=list(train),
        valset=list(train[:ANCHOR]),
        strategy="p -> w",
        num_threads=config.rollout.num_threads,
    )


def gepa(metric: Callable[..., Any], cap: int, config: FSTConfig) -> dspy.GEPA:
    """DSPy's GEPA with our extractive reflector as its proposer: no API is needed, and both sides read the same."""
    return dspy.GEPA(
        metric=score_in_feedback(metric),
        max_metric_calls=cap,
        instruction_proposer=proposer(ExtractiveReflector(config.seed)),
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


def proposer(reflector: ExtractiveReflector) -> Callable[..., dict[str, str]]:
    """The reflector as GEPA's proposer: new texts for the components for which the feedback has a new sentence."""

    def propose(
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        entries = {name: [entry_of(one) for one in reflective_dataset.get(name, ())] for name in components_to_update}
        return {name: reflector(name, candidate[name], entries[name]) or candidate[name] for name in entries}

    return propose


def entry_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """GEPA's entry as our reflector reads it; a failed parse has no score of ours and counts as 0."""
    match = re.match(r"\[(-?[\d.]+)\]\n", str(given["Feedback"]))
    words = str(given["Feedback"])[match.end() :] if match else ""
    return {**given, "Feedback": words, "Metric Feedback": words, "Score": float(match[1]) if match else 0.0}


def run(method: str, request: RunRequest) -> None:
    """Learn, score before and after, and leave the files that a comparison reads."""
    plan = plan_run(request)
    config, task = plan.settings.config, plan.task
    files, _ = open_run(request.run_dir, resume=False)
    train, val, test = (task.load(split, size) for split, size in asdict(plan.sizes).items())
    valset, testset = items_of(val, "val"), items_of(test, "test")
    with closing(make_policy(request, plan)) as policy:
        program = attach_policy(give_lm(task.build_program(), policy.lm), policy)
        metrics = MetricsLog(files.metrics)
        write_json(
            files.config,
            record.describe_run(config, policy, request.task, items_of(train, "train"), valset, testset),
        )

        def scored(
            program: dspy.Module, counts: RolloutCounts, cycle: int
        ) -> tuple[ValidationScore, float, RolloutCounts]:
            """A program's validation and test scores, and the rollouts with those made here."""
            _, version = checked_student(program)
            collector = collector_of(program, policy, task.metric, config)
            candidate = Candidate(seed_texts(program))
            found = evaluate_pair(collector, candidate, valset, config.eval, version=version)
            tested = evaluate(collector, candidate, testset, version=version)
            counts = counts.plus(eval=found.rollouts + tested.rollouts)
            fields = eval_fields(candidate, found)
            metrics.line("eval", cycle=cycle, step=version, policy_version=version, rollouts=counts, **fields)
            return found, tested.score, counts

        before, test_before, counts = scored(program, RolloutCounts(), 0)
        counter = RunCounter(type(program))
        adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
        with dspy.context(callbacks=[counter], adapter=adapter, lm=policy.lm):
            better = optimize(method, program, task.metric, train, config)
        # dspy-together's runs are of both sides (its GEPA and its GRPO get half of the cap each), counted as slow.
        learned = counts.plus(**{"fast" if method == "dspy-gepa" else "slow": counter.count})
        after, test_after, counts = scored(better, learned, 1)
        result = {
            "task": request.task,
            "method": method,
            "seed": config.seed,
            "val_score_before": before.score,
            "test_score_before": test_before,
            "val_score_after": after.score,
            "test_score_after": test_after,
            "rollouts": counts.to_json(),
            "steps": policy.version,
            "cycles": 1,
            "reflection_calls": 0,
            "cost_usd": 0.0,
            "wall_s": metrics.time_s,
            "kl_to_base": after.kl_to_base,
            "policy_version": policy.version,
            "candidate": seed_texts(better),
            "ended": "done",
        }
        write_json(files.result, result)


def main() -> None:
    """One run, in a process of its own."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--method", choices=DSPY_METHODS, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--model")
    parser.add_argument("--config", type=Path)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-size", type=int)
    read = parser.parse_args()
    sizes = Sizes(read.train_size, read.val_size, read.test_size)
    request = RunRequest(
        read.task, read.run_dir, read.model, config_file=read.config, sets=tuple(read.set), sizes=sizes
    )
    run(read.method, request)


if __name__ == "__main__":
    main()
