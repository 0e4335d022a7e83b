"""`FST`: check everything, run cycles, return the program with its instructions and its policy version.

    policy = Policy("Qwen/Qwen3-1.7B")
    program.set_lm(policy.lm)
    better = FST(metric).compile(program, trainset=train, valset=val)

The cycles themselves are in `cycle`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.teleprompt import Teleprompter

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.run import FSTConfig, preset
from fst_optimizer.cycle import Parts, committed, counting, run_cycle, validated
from fst_optimizer.data import split_data
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflect import ExtractiveReflector, LMReflector
from fst_optimizer.program.student import (
    Teacher,
    attach_policy,
    check_roles,
    checked_student,
    checked_teachers,
    without_unsaveable_lms,
)
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.run import record
from fst_optimizer.run.evaluate import evaluate
from fst_optimizer.run.saver import Saver
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.files import (
    RunFiles,
    locked,
    open_run,
    sync,
    write_json,
    writing,
)
from fst_optimizer.store.meter import Meter
from fst_optimizer.store.metrics import Callback, MetricsLog
from fst_optimizer.types import Candidate, Item, Population, items_of

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileResult:
    """What `program.detailed_results` holds."""

    run_dir: Path
    result: Mapping[str, Any]
    """The content of `result.json`."""
    population: Population
    """The last population, with scores on its anchor."""
    best: Best
    """The (candidate, policy version) pair that the program carries."""


class FST(Teleprompter):  # type: ignore[misc]
    """Fast-Slow Training as a DSPy optimizer.

    Args:
        metric: `(example, prediction)`, or `(example, prediction, trace, pred_name, pred_trace)` for feedback by
            predictor. Returns a number, or `dspy.Prediction(score=..., feedback=...)`.
        auto: `light`, `medium` or `heavy`; ignored when `config` is given.
        reflection_lm: Writes new instructions from feedback, by GEPA's reflective proposer. None: the built-in
            extractive reflector, which takes over sentences that recur in the feedback and calls no LM.
        config: An `FSTConfig`, or nested settings over the defaults.
        run_dir: Where the run's files go. None: a new folder under `runs/`.
        resume: Go on with the unfinished run in `run_dir`.
        allow_changes: Resume although settings, data, model or library versions are not those that the run began with.
        callbacks: Called with every line of `metrics.jsonl` and with progress.
        task: The name in `result.json`. None: the program's class.
        testset: Scored greedily before the first cycle and at the end, for `result.json`; nothing is learned from it
            or chosen on it. None: no test scores.

    Raises:
        UserError: a setting is wrong; the text names it, its value and the remedy.
    """

    def __init__(
        self,
        metric: Any,
        *,
        auto: str = "light",
        reflection_lm: dspy.LM | None = None,
        config: FSTConfig | Mapping[str, Any] | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        allow_changes: bool = False,
        callbacks: Sequence[Callback] = (),
        task: str | None = None,
        testset: Sequence[dspy.Example] | None = None,
    ) -> None:
        super().__init__()
        self.metric = Metric(metric)
        base = preset(auto)
        if config is not None:
            base = config if isinstance(config, FSTConfig) else FSTConfig.from_dict(config)
        self.config = base
        self.reflection_lm = reflection_lm
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.resume = resume
        self.allow_changes = allow_changes
        self.listeners = tuple(callbacks)  # not `callbacks`, which dspy keeps for its own kind
        self.task = task
        self.testset = None if testset is None else items_of(testset, "test")
        if self.testset == ():
            raise UserError("testset is empty: give examples, or None for no test scores")
        if resume and run_dir is None:
            raise UserError("resume is True and run_dir is None: name the run directory to go on with")

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Learn instructions and weights together; `student` itself is not changed.

        Args:
            student: A program whose predictors use one policy's `lm`.
            trainset: Examples to learn from.
            teacher: Another program on the same policy, or several: better prompted, with demos, or at another policy
                version (`policy.lm_at`). Their rollouts join every group of the slow steps, and are trained on.
            valset: Examples to choose the best pair on. None: a seeded fifth of `trainset` is held out.

        Returns:
            A copy with the best candidate's instructions, its LM serving the best policy version, and
            `detailed_results`, a `CompileResult`.

        Raises:
            UserError: something about the student, the data or the run directory is wrong; nothing was spent.
            MetricError, EngineError, TrainingError, StorageError: a part broke; the last checkpoint stands.
            Paused: a monitor with `pause` saw what it watches for.
        """
        policy, start_version = checked_student(student)
        check_roles(seed_texts(student), self.config)
        if self.config.train.credit == "predictor" and not self.metric.per_predictor:
            raise UserError(
                "train.credit is 'predictor', and the metric takes two arguments: give it five (example, prediction, "
                "trace, pred_name, pred_trace), so that it can score each predictor, or set train.credit='rollout'"
            )
        teachers = checked_teachers(teacher, policy)
        train, val = split_data(trainset, valset, self.config.seed)
        run_dir = self.run_dir or default_run_dir(student)
        with locked(run_dir):
            return self._run(run_dir, student, policy, start_version, train, val, teachers)

    def _run(
        self,
        run_dir: Path,
        student: dspy.Module,
        policy: Policy,
        start_version: int,
        train: tuple[Item, ...],
        val: tuple[Item, ...],
        teachers: tuple[Teacher, ...],
    ) -> dspy.Module:
        files, resuming = open_run(run_dir, resume=self.resume)
        changes: list[str] = []
        name = self.task or type(student).__name__
        description = record.describe_run(self.config, policy, name, train, val, self.testset, teachers)
        description["program"] = {
            "instructions": seed_texts(student),
            "reflection_lm": None if self.reflection_lm is None else str(self.reflection_lm.model),
        }
        if resuming:
            before = read_config(files.config)
            changes = record.changes(before, description)
            record.check_same_run(changes, allowed=self.allow_changes)
            if changes:
                write_json(files.config, {**description, "changes": [*before.get("changes", []), *changes]})
        else:
            write_json(files.config, description)
            policy.restore(start_version, policy.tensors(start_version) if start_version else None)
        program = attach_policy(student, policy)
        parts = self._parts(program, policy, train, val, files, teachers)
        try:
            state = self._start(parts, program, resuming, changed=bool(changes))
            while not state.over:
                state = run_cycle(parts, state)
            return self._finish(student, parts, state)
        except KeyboardInterrupt:
            logger.info("interrupted; go on with run_dir=%r, resume=True (fst compile ... --resume)", str(files.root))
            raise
        finally:
            parts.saver.close()

    def _parts(
        self,
        program: dspy.Module,
        policy: Policy,
        train: tuple[Item, ...],
        val: tuple[Item, ...],
        files: RunFiles,
        teachers: tuple[Teacher, ...],
    ) -> Parts:
        config = self.config
        reflector = LMReflector(self.reflection_lm) if self.reflection_lm else ExtractiveReflector(config.seed)
        meter = Meter(config.budget, lambda: reflector.cost_usd)
        taught = {one.candidate.id: one.program for one in teachers}
        collector = Collector(
            lambda candidate: taught.get(candidate.id) or apply_texts(program, candidate.texts),
            policy,
            self.metric,
            seed=config.seed,
            num_threads=config.rollout.num_threads,
            timeout_s=config.rollout.timeout_s,
            meter=meter,
            grace_s=config.run.grace_s,
        )
        trainer = policy.trainer(config.train) if config.method != "gepa" else None
        metrics = MetricsLog(files.metrics, self.listeners)
        payers = (collector, reflector) if isinstance(reflector, LMReflector) else (collector,)
        return Parts(
            config=config,
            policy=policy,
            collector=collector,
            trainer=trainer,
            meter=meter,
            reflector=reflector,
            components=tuple(filter(config.evolves, seed_texts(program))),
            teachers=teachers,
            trainset=train,
            valset=val,
            files=files,
            metrics=metrics,
            saver=Saver(files, policy, trainer, metrics, meter, payers, config.run.keep_checkpoints),
        )

    def _start(self, parts: Parts, program: dspy.Module, resuming: bool, *, changed: bool) -> State:
        """The committed state, or the first one; evaluated before any cycle."""
        if resuming:
            state = parts.saver.resume(changed=changed)
        else:
            seed, version = Candidate(seed_texts(program)), parts.policy.version
            state = State(population=Population((seed,), version), best=Best(seed, version), policy_version=version)
            state = committed(parts, state)
        if state.started:
            return state
        with parts.meter.free():
            state = validated(parts, state)
        state = replace(state, val_score_before=state.best.score)
        state, test_score = self._tested(parts, state)
        return committed(parts, replace(state, test_score_before=test_score, started=True))

    def _tested(self, parts: Parts, state: State) -> tuple[State, float | None]:
        """The best pair's test score so far, its rollouts counted."""
        if self.testset is None:
            return state, None
        with parts.meter.free():
            found = evaluate(
                parts.collector,
                state.best.candidate,
                self.testset,
                version=state.best.policy_version,
                on_rollout=counting(parts.metrics, "test", len(self.testset)),
            )
        counts = state.rollouts.plus(eval=found.rollouts)
        return replace(state, rollouts=counts, **parts.meter.spent()), found.score

    def _finish(self, student: dspy.Module, parts: Parts, state: State) -> dspy.Module:
        """The compiled program, on disk and in hand."""
        policy, best = parts.policy, state.best
        version = best.policy_version
        policy.restore(version, policy.tensors(version) if version else None)
        compiled = apply_texts(attach_policy(student, policy, version), best.candidate.texts)
        compiled._compiled = True
        save_program(compiled, parts.files.program)
        # Before result.json, whose presence means finished: a crash while testing is mended by a resume.
        state, test_score = self._tested(parts, state)
        name = self.task or type(student).__name__
        result = record.result_of(self.config, name, state, parts.metrics.time_s, test_score)
        write_json(parts.files.result, result)
        parts.saver.finish()
        compiled.detailed_results = CompileResult(parts.files.root, result, state.population, best)
        return compiled


def save_program(program: dspy.Module, path: Path) -> None:
    """Write a program's DSPy state, without LMs that cannot be saved, whole or not at all.

    Raises:
        StorageError: It could not be written.
    """
    temporary = path.with_name(".program.tmp.json")
    with writing(path):
        try:
            without_unsaveable_lms(program).save(str(temporary))
        except RuntimeError as error:  # dspy's own, around whatever it was
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def default_run_dir(student: dspy.Module) -> Path:
    """A new folder under `runs/`, named after the program and the time."""
    return Path("runs") / f"{type(student).__name__}-{time.strftime('%Y%m%d-%H%M%S')}"
