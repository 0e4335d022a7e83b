"""`fst eval`: the test score of a finished run, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import load, read_finished
from fst_optimizer.program.student import checked_student
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.run.evaluate import Evaluation, OnRollout, evaluate
from fst_optimizer.run.record import digest
from fst_optimizer.types import Candidate, items_of

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy


@dataclass(frozen=True)
class TestScore:
    """A finished run's program on a test set, beside what the run recorded."""

    evaluation: Evaluation
    recorded: float | None
    """The run's own `test_score_after`. None: the run had no test set."""
    same_examples: bool
    """Whether these are the examples of the recorded score."""

    __test__ = False  # pytest takes the name for a test class


def score_run(
    run_dir: Path,
    examples: Sequence[dspy.Example],
    metric: Callable[..., Any],
    *,
    model: str | None = None,
    engine: str | None = None,
    on_rollout: OnRollout | None = None,
) -> TestScore:
    """Score a finished run's program greedily, exactly as the run did at its end.

    Args:
        run_dir: What `fst compile --run-dir` left.
        examples: The test set.
        metric: The task's metric.
        model: Where the base model is now. None: where it was.
        engine: What generates. None: what the run used.
        on_rollout: Called as each rollout ends.
    """
    if not examples:
        raise UserError("the test set is empty: give examples")
    run = read_finished(run_dir)
    program = load(run_dir, model=model, engine=engine)
    policy, version = checked_student(program)
    collector = collector_of(program, policy, metric, FSTConfig.from_dict(run.config["config"]))
    items = items_of(examples, "test")
    try:
        found = evaluate(collector, Candidate(seed_texts(program)), items, version=version, on_rollout=on_rollout)
    finally:
        policy.close()
    return TestScore(found, run.result["test_score_after"], digest(items) == run.config["data"].get("test"))


def collector_of(program: dspy.Module, policy: Policy, metric: Callable[..., Any], config: FSTConfig) -> Collector:
    """A collector that runs `program` with a candidate's texts, as `config` says."""
    return Collector(
        lambda candidate: apply_texts(program, candidate.texts),
        policy,
        Metric(metric),
        seed=config.seed,
        num_threads=config.rollout.num_threads,
        timeout_s=config.rollout.timeout_s,
    )
