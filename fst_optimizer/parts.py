"""What a run and the dry run before it are put together from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fst_optimizer.evolve.extractive import ExtractiveReflector
from fst_optimizer.evolve.reflect import LMReflector, Reflector
from fst_optimizer.phases import commit
from fst_optimizer.planned import RunSizes
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.run.state import Best, State, Stream
from fst_optimizer.types import Candidate, Population

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.dry_run import DryRun
    from fst_optimizer.rollout.metric import Metric
    from fst_optimizer.run.run import Given, Run
    from fst_optimizer.store.meter import Meter
    from fst_optimizer.train.trainer import Trainer


def components_of(given: Given) -> tuple[str, ...]:
    """The predictors whose instructions may change."""
    return tuple(filter(given.config.evolves, seed_texts(given.student)))


def sizes_of(given: Given, test: int) -> RunSizes:
    """What the run's length depends on besides its settings; `test` examples are scored before and after."""
    return RunSizes(
        train=len(given.train),
        val=len(given.val),
        test=test,
        components=len(components_of(given)),
        teachers=len(given.teachers),
        start_version=given.start_version,
    )


def reflector_of(lm: dspy.LM | None, config: FSTConfig) -> Reflector:
    """Writes new instructions: the reflection LM, or without one what recurs in the feedback."""
    if lm is None:
        return ExtractiveReflector(config.seed)
    longest, grace_s = config.fast.max_instruction_tokens, config.run.grace_s
    return LMReflector(lm, config.budget.prices, config.seed, max_tokens=longest, grace_s=grace_s)


def collector_of(program: dspy.Module, given: Given, metric: Metric, meter: Meter) -> Collector:
    """Runs candidates and teachers. `program`: the student with its LMs on its predictors."""
    taught = {one.candidate.id: one.program for one in given.teachers}
    return Collector(
        lambda candidate: taught.get(candidate.id) or apply_texts(program, candidate.texts),
        given.policy,
        metric,
        given.config,
        meter,
        must_work=True,
    )


def trainer_of(given: Given) -> Trainer | None:
    """What updates the weights; None where the method leaves them as they are."""
    config, lesson = given.config, given.lesson
    if lesson:
        return given.policy.distiller(config.train, lesson.version, full=config.distill.full_vocabulary)
    return given.policy.trainer(config.train) if config.method != "gepa" else None


def first_state(run: Run, program: dspy.Module, dry_run: DryRun | None) -> State:
    """The state of a new run, with what its dry run spent, committed; the plan is told."""
    if dry_run:
        run.metrics.tell("plan", text=dry_run.plan)
    spent = dry_run.spent if dry_run else {}
    seed, version = Candidate(seed_texts(program)), run.policy.version
    stream = Stream(len(run.stages)) if run.stages else None
    population, best = Population((seed,), version), Best(seed, version)
    state = State(population, best, seed=seed, policy_version=version, stream=stream, **spent)
    run.meter.resume(state, 0.0)
    return commit(run, state)
