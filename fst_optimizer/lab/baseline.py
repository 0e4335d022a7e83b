"""What the runs of all baselines share: the start, how they are scored, and the files that they leave.

A baseline is a method that is none of `fst compile`'s. It begins with the same program, policy and data as ours, and
its scores are made by the same code, so that `fst lab compare` reads its directory as any other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dspy

from fst_optimizer.children import end_with_parent
from fst_optimizer.config.formats import GIVEN
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.evolve.reflect import Reflector
from fst_optimizer.evolve.reflection_lm import name_of
from fst_optimizer.finished.score import collector_of
from fst_optimizer.parts import reflector_of
from fst_optimizer.policy.policy import Policy
from fst_optimizer.program.lms import attach_policy, give_lm
from fst_optimizer.program.student import checked_student
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.run import record
from fst_optimizer.run.evaluate import evaluate, evaluate_pair
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.store.files import RunFiles, check_run_dir, locked, open_run, write_json
from fst_optimizer.store.metrics import MetricsLog, eval_fields
from fst_optimizer.task_run import RunPlan, RunRequest, Sizes, make_policy, plan_run, reflection_lm_of
from fst_optimizer.tasks import Task
from fst_optimizer.types import Candidate, Item, RolloutCounts, items_of


@dataclass
class Start:
    """What a baseline learns with; it may validate on the way."""

    task: Task
    config: FSTConfig
    policy: Policy
    program: dspy.Module
    """Its predictors have their LMs."""
    train: Sequence[dspy.Example]
    reflector: Reflector
    """Writes instructions, as for our methods: the reflection LM, or the extractive one."""
    valset: Sequence[Item]
    testset: Sequence[Item]
    metrics: MetricsLog
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    """Rollouts so far."""

    def validate(self, program: dspy.Module, step: int, cycle: int) -> ValidationScore:
        """The score of a program at the version that its LM serves, on the validation set; counted and written down."""
        collector, candidate, version = self._scored(program)
        found = evaluate_pair(collector, candidate, self.valset, self.config.eval, version=version)
        self.counts = self.counts.plus(eval=found.rollouts)
        fields = eval_fields(candidate, found)
        self.metrics.line("eval", cycle=cycle, step=step, policy_version=version, rollouts=self.counts, **fields)
        return found

    def test(self, program: dspy.Module) -> float | None:
        """The same on the test set; None without one."""
        if not self.testset:
            return None
        collector, candidate, version = self._scored(program)
        found = evaluate(collector, candidate, self.testset, version=version)
        self.counts = self.counts.plus(eval=found.rollouts)
        return found.score

    def _scored(self, program: dspy.Module) -> tuple[Any, Candidate, int]:
        _, version = checked_student(program)
        collector = collector_of(program, self.policy, self.task.metric, self.config)
        return collector, Candidate(seed_texts(program)), version


@dataclass(frozen=True)
class Learned:
    """What a baseline came to."""

    program: dspy.Module
    """Its LM serves the version that was learned."""
    validated: ValidationScore
    steps: int
    """Updates of the weights."""
    cycles: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What `result.json` has besides."""


Learn = Callable[[Start, ValidationScore], Learned]
"""Takes the score before learning too."""


def run(method: str, request: RunRequest, learn: Learn) -> None:
    """Score, learn, score again, and leave the files that a comparison reads.

    A run that was interrupted begins again.
    """
    plan = plan_run(request)
    check_run_dir(request.run_dir, resume=False)  # before the lock makes the directory
    with locked(request.run_dir), closing(make_policy(request, plan)) as policy:
        files, _ = open_run(request.run_dir, resume=False)
        start = _started(request, plan, policy, files)
        before, test_before = start.validate(start.program, 0, 0), start.test(start.program)
        learned = learn(start, before)
        test_after = start.test(learned.program)
        _, version = checked_student(learned.program)
        result = {
            "task": request.task,
            "method": method,
            "seed": start.config.seed,
            "val_score_before": before.score,
            "val_score_after": learned.validated.score,
            "test_score_before": test_before,
            "test_score_after": test_after,
            "rollouts": start.counts.to_json(),
            "steps": learned.steps,
            "cycles": learned.cycles,
            "reflection_calls": start.reflector.calls,
            "cost_usd": start.reflector.cost_usd,
            "wall_s": start.metrics.time_s,
            "kl_to_base": learned.validated.kl_to_base,
            "policy_version": version,
            "candidate": seed_texts(learned.program),
            "ended": "done",
            **learned.extra,
        }
        write_json(files.result, result)


def _started(request: RunRequest, plan: RunPlan, policy: Policy, files: RunFiles) -> Start:
    config, task = plan.settings.config, plan.task
    train, val, test = (task.load(split, size) for split, size in asdict(plan.sizes).items())
    program = attach_policy(give_lm(task.build_program(), policy.lm), policy)
    program = apply_texts(program, plan.instructions or {})
    lm = reflection_lm_of(request, plan)(policy)
    valset, testset = items_of(val, "val"), items_of(test, "test")
    description = record.describe_run(config, policy, request.task, items_of(train, "train"), valset, testset or None)
    description["program"] = {
        "instructions": seed_texts(program),
        "reflection_lm": name_of(lm, policy),
        **({GIVEN: True} if plan.instructions else {}),
    }
    write_json(files.config, description)
    reflector = reflector_of(lm, config)
    return Start(task, config, policy, program, train, reflector, valset, testset, MetricsLog(files.metrics))


def main(methods: Sequence[str], learn: Callable[[str], Learn], about: str | None) -> None:
    """One run, in a process of its own: `python -m MODULE TASK --method M --run-dir DIR ...`."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("task")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--model")
    parser.add_argument("--reflection-lm")
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--config", type=Path)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-size", type=int)
    read = parser.parse_args()
    request = RunRequest(
        read.task,
        read.run_dir,
        read.model,
        reflection_lm=read.reflection_lm,
        config_file=read.config,
        sets=tuple(read.set),
        sizes=Sizes(read.train_size, read.val_size, read.test_size),
        instructions=read.instructions,
    )
    run(read.method, request, learn(read.method))
