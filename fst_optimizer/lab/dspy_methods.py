"""DSPy's own optimizers on our policy, as methods of a comparison: `dspy-gepa`, `dspy-grpo`, `dspy-together`.

Each starts from the same program, policy and data as our methods, may run the program `budget.max_rollouts` times to
learn, and leaves a directory that `fst lab compare` reads. Program runs are counted as they happen. The final program
is scored greedily on validation and test sets by the same code as ours.

What differs, and cannot be helped: these optimizers do not look at the validation set on the way, so they have no
curve, and `dspy-grpo` returns its last weights, not its best.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.utils.callback import BaseCallback

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.evolve.reflect import ExtractiveReflector
from fst_optimizer.lab.plan import DSPY_METHODS
from fst_optimizer.program.lms import attach_policy, give_lm
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.run import record
from fst_optimizer.run.evaluate import evaluate, measure_kl
from fst_optimizer.store.files import open_run, write_json
from fst_optimizer.store.metrics import MetricsLog
from fst_optimizer.task_run import Choices, Plan, Sizes, make_policy, plan_run
from fst_optimizer.types import Candidate, Item, RolloutCounts, items_of

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy

ANCHOR = 32
"""Training examples that GEPA scores every accepted candidate on: its Pareto set, paid from its budget."""


class RunCounter(BaseCallback):  # type: ignore[misc]
    """Counts how often a program is run, by whomever, in whatever thread."""

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
    # learns; those runs, and GEPA's last full evaluation, which passes its limit, are paid from the same cap.
    half = (cap - 8 * ANCHOR) // 2
    together = dspy.BetterTogether(metric=plain(metric), p=gepa(metric, half, config), w=grpo(metric, half, config))
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
        metric=told(metric),
        max_metric_calls=cap,
        instruction_proposer=Proposer(ExtractiveReflector(config.seed)),
        reflection_minibatch_size=config.fast.minibatch,
        num_threads=config.rollout.num_threads,
        seed=config.seed,
    )


def grpo(metric: Callable[..., Any], cap: int, config: FSTConfig) -> Any:
    """DSPy's GRPO with our batch, group and learning rate, and as many steps as the cap pays."""
    from dspy.teleprompt.grpo import GRPO

    rollout, train = config.rollout, config.train
    return GRPO(
        metric=plain(metric),
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


def plain(metric: Callable[..., Any]) -> Callable[..., float]:
    """The metric as a number, for optimizers that read no feedback."""

    def score(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        judged = metric(example, prediction)
        return float(getattr(judged, "score", judged))

    return score


def told(metric: Callable[..., Any]) -> Callable[..., Any]:
    """The metric with its score written before the feedback: GEPA hands proposers the words alone."""

    def judged(
        example: dspy.Example, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        found = metric(example, prediction, trace, pred_name, pred_trace)
        whole = metric(example, prediction, trace)
        return dspy.Prediction(score=float(whole.score), feedback=f"[{float(found.score):.6f}]\n{found.feedback}")

    return judged


class Proposer:
    """The extractive reflector as GEPA's proposer."""

    def __init__(self, reflector: ExtractiveReflector) -> None:
        self.reflector = reflector

    def __call__(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        """New texts for the components for which the feedback has a new sentence."""
        new = {}
        for name in components_to_update:
            entries = [entry_of(one) for one in reflective_dataset.get(name, ())]
            text = self.reflector(name, candidate[name], entries)
            new[name] = text or candidate[name]
        return new


def entry_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """GEPA's entry as our reflector reads it; a failed parse has no score of ours and counts as 0."""
    match = re.match(r"\[(-?[\d.]+)\]\n", str(given["Feedback"]))
    words = str(given["Feedback"])[match.end() :] if match else ""
    return {**given, "Feedback": words, "Metric Feedback": words, "Score": float(match[1]) if match else 0.0}


def run(method: str, choices: Choices, plan: Plan) -> dict[str, Any]:
    """Learn, score before and after, and leave the files that a comparison reads."""
    config, task, sizes = plan.settings.config, plan.task, plan.sizes
    files, _ = open_run(choices.run_dir, resume=False)
    policy = make_policy(choices, plan)
    try:
        program = attach_policy(give_lm(task.build_program(), policy.lm), policy)
        metrics = MetricsLog(files.metrics)
        train, val, test = (task.load(split, getattr(sizes, split)) for split in ("train", "val", "test"))
        held_out = {"val": items_of(val, "val"), "test": items_of(test, "test")}
        description = record.describe_run(
            config, policy, choices.task, items_of(train, "train"), held_out["val"], held_out["test"]
        )
        write_json(files.config, description)
        before, counts = _scored(program, policy, task.metric, held_out, config, metrics, RolloutCounts(), 0)
        counter = RunCounter(type(program))
        adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
        with dspy.context(callbacks=[counter], adapter=adapter, lm=policy.lm):
            better = optimize(method, program, task.metric, train, config)
        # Program runs of dspy-together are of both sides; its GEPA and its GRPO get half of the cap each.
        learned = counts.plus(**{"fast" if method == "dspy-gepa" else "slow": counter.count})
        after, counts = _scored(better, policy, task.metric, held_out, config, metrics, learned, 1)
        result = {
            "task": choices.task,
            "method": method,
            "seed": config.seed,
            **{f"{split}_score_before": before[split] for split in held_out},
            **{f"{split}_score_after": after[split] for split in held_out},
            "rollouts": counts.to_json(),
            "steps": policy.version,
            "cycles": 1,
            "reflection_calls": 0,
            "cost_usd": 0.0,
            "wall_s": metrics.time_s,
            "kl_to_base": after["kl"],
            "policy_version": policy.version,
            "candidate": seed_texts(better),
            "ended": "done",
        }
        write_json(files.result, result)
    finally:
        policy.close()
    return result


def _scored(
    program: dspy.Module,
    policy: Policy,
    metric: Callable[..., Any],
    held_out: Mapping[str, Sequence[Item]],
    config: FSTConfig,
    metrics: MetricsLog,
    counts: RolloutCounts,
    cycle: int,
) -> tuple[dict[str, float], RolloutCounts]:
    """Greedy scores of the program by split, and its KL; written down as an evaluation."""
    versions = {predictor.lm.engine.version for predictor in program.predictors()} - {None}
    version = max(versions, default=policy.version)
    collector = Collector(
        lambda candidate: apply_texts(program, candidate.texts),
        policy,
        Metric(metric),
        seed=config.seed,
        num_threads=config.rollout.num_threads,
        timeout_s=config.rollout.timeout_s,
    )
    candidate = Candidate(seed_texts(program))
    found = {split: evaluate(collector, candidate, items, version=version) for split, items in held_out.items()}
    kl, extra = measure_kl(collector, policy, candidate, held_out["val"], config.eval, version=version)
    counts = counts.plus(eval=extra + sum(one.rollouts for one in found.values()))
    metrics.line(
        "eval",
        cycle=cycle,
        step=version,
        policy_version=version,
        rollouts=counts,
        split="val",
        score=found["val"].score,
        kl_to_base=kl,
        candidate=candidate.id,
        failed=found["val"].failed,
    )
    return {**{split: one.score for split, one in found.items()}, "kl": kl}, counts


def main(given: Sequence[str] | None = None) -> int:
    """One run, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--method", choices=DSPY_METHODS, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--model")
    parser.add_argument("--config", type=Path)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-size", type=int)
    read = parser.parse_args(given)
    choices = Choices(
        task=read.task,
        run_dir=read.run_dir,
        model=read.model,
        config_file=read.config,
        sets=tuple(read.set),
        sizes=Sizes(read.train_size, read.val_size, read.test_size),
    )
    run(read.method, choices, plan_run(choices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
