"""`fst eval`: the test score of a finished run, from its files alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import load, read_finished
from fst_optimizer.finished.recorded import recorded_size, scoring_config
from fst_optimizer.program.student import checked_student
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.run.evaluate import Evaluation, evaluate
from fst_optimizer.run.record import digest
from fst_optimizer.tasks import load_task
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


def score_task(
    name: str,
    run_dir: Path,
    *,
    test_size: int | None = None,
    model: str | None = None,
    engine: str | None = None,
    url: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TestScore:
    """Score a finished run's program on a task's test set: greedily, exactly as the run did at its end.

    Another variant of the run's task scores the program on that, where its program has the same predictors.
    What is None is as it was in the run, but for the `url` of a server, which the caller alone gives. `on_progress` is
    told how many examples are scored, of how many.
    """
    run, task = read_finished(run_dir), load_task(name)
    recorded = run.config["data"].get("test")
    items = items_of(task.load("test", test_size or recorded_size(run.config, "test")), "test")
    if not items:
        raise UserError("the test set is empty: give examples")
    at = {} if url is None else {"url": url}
    program = load(run_dir, task=name, model=model, engine=engine, **at)
    policy, version = checked_student(program)
    collector = collector_of(program, policy, task.metric, scoring_config(run.config["config"]))
    done = itertools.count(1)
    with closing(policy):
        found = evaluate(
            collector,
            Candidate(seed_texts(program)),
            items,
            version=version,
            on_rollout=lambda _: on_progress(next(done), len(items)) if on_progress else None,
        )
    return TestScore(found, run.result["test_score_after"], digest(items) == recorded)


def collector_of(program: dspy.Module, policy: Policy, metric: Callable[..., Any], config: FSTConfig) -> Collector:
    """A collector that runs `program` with a candidate's texts, as `config` says."""
    return Collector(
        lambda candidate: apply_texts(program, candidate.texts), policy, Metric(metric), config, must_work=True
    )
