"""`FST`: check everything, run cycles, return the program with its instructions and its policy version.

    policy = Policy("Qwen/Qwen3-1.7B")
    program.set_lm(policy.lm)
    better = FST(metric).compile(program, trainset=train, valset=val)

The cycles themselves are in `cycle`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import dspy
from dspy.teleprompt import Teleprompter

from fst_optimizer.config.arguments import FSTArguments, by_arguments, check_callables, check_keywords, run_folder
from fst_optimizer.config.formats import GIVEN, read_config
from fst_optimizer.config.overrides import base_config
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.cycle import run_cycle
from fst_optimizer.data import listed, split_data, stages_of
from fst_optimizer.distill.cycle import distill, gate
from fst_optimizer.distill.lesson import Lesson, before_compiling, short_texts
from fst_optimizer.dry_run import DryRun, dry_run
from fst_optimizer.ends import start, tested
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflect import LMReflector
from fst_optimizer.evolve.reflection_lm import check_lm, name_of
from fst_optimizer.logs import FROM_PYTHON, KeptWarnings, kept_warnings
from fst_optimizer.model.load import path_to_say
from fst_optimizer.parts import collector_of, components_of, first_state, reflector_of, trainer_of
from fst_optimizer.phases import warned
from fst_optimizer.program.lms import attach_policy, keep_keys_of
from fst_optimizer.program.student import check_roles, checked_student, checked_teachers
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.progress.display import shown
from fst_optimizer.progress.tables import from_python
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.run import record
from fst_optimizer.run.result import compile_result
from fst_optimizer.run.run import Given, Run
from fst_optimizer.run.saver import Saver
from fst_optimizer.run.state import State
from fst_optimizer.store.files import RunFiles, check_run_dir, checksum, locked, new_run_dir, open_run, write_json
from fst_optimizer.store.meter import Meter
from fst_optimizer.store.metrics import Callback, MetricsLog
from fst_optimizer.stream import described, result_fields, stream_config
from fst_optimizer.types import Candidate, Texts, items_of

logger = logging.getLogger(__name__)


class FST(Teleprompter):  # type: ignore[misc]
    """Fast-Slow Training as a DSPy optimizer.

    Args:
        metric: `(example, prediction)`, or `(example, prediction, trace, pred_name, pred_trace)` for feedback by
            predictor. Returns a number, or `dspy.Prediction(score=..., feedback=...)`.
        auto: `light`, `medium`, `heavy` or `paper` (what the paper gives): the preset under `config`.
        reflection_lm: Writes new instructions from feedback, by GEPA's reflective proposer. None: the built-in
            extractive reflector, which takes over sentences that recur in the feedback and calls no LM.
        config: Nested settings, or an `FSTConfig`. What it sets goes over the preset; an `FSTConfig` sets what was
            given when it was made, and `config.complete()` leaves nothing to the preset.
        run_dir: Where the run's files go. None: a new folder under `runs/`.
        log_dir: The same, as `dspy.GEPA` calls it. There it also resumes; here `resume` says so.
        seed: `config.seed`, over the one in `config`.
        num_threads: `config.rollout.num_threads`, over the one in `config`.
        track_stats: Whether the compiled program has `detailed_results`. All of it is in the run's folder anyway.
        resume: Go on with the unfinished run in `run_dir`.
        allow_changes: Resume although settings, data, model or library versions are not those that the run began with.
        callbacks: Called with every line of `metrics.jsonl` and with progress.
        progress: Show the run while it goes: live in a terminal or a notebook, as lines on stderr elsewhere. False:
            nothing but warnings.
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
        log_dir: str | Path | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
        track_stats: bool = True,
        resume: bool = False,
        allow_changes: bool = False,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        task: str | None = None,
        testset: Sequence[dspy.Example] | None = None,
    ) -> None:
        super().__init__()
        FSTArguments(
            auto=auto, track_stats=track_stats, resume=resume, allow_changes=allow_changes, progress=progress, task=task
        )
        check_callables("callbacks", callbacks)
        self.metric = Metric(metric)
        self.config = by_arguments(base_config(config, auto), seed=seed, num_threads=num_threads)
        check_lm(reflection_lm)
        keep_keys_of(reflection_lm)
        self.reflection_lm = reflection_lm
        self.run_dir = run_folder(run_dir, log_dir)
        self.track_stats = track_stats
        self.resume = resume
        self.allow_changes = allow_changes
        self.listeners = tuple(callbacks)  # not `callbacks`, which dspy keeps for its own kind
        self.progress = progress
        self.task = task
        self.instructions_given = False
        """Whether the students' instructions were given beside a task whose own are others, for `config.json`."""
        self.seed_instructions: Texts | None = None
        self.distilled_from: Mapping[str, Any] | None = None
        """What a run's files say of a program to be distilled: what it was compiled from, and where it comes from."""
        self.testset = None if testset is None else items_of(listed(testset, "testset"), "test")
        if self.testset == ():
            raise UserError("testset is empty: give examples, or None for no test scores")
        if resume and self.run_dir is None:
            raise UserError("resume is True and run_dir is None: name the run directory to go on with")

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        student_follows: bool = False,
        seed: int | None = None,
        num_threads: int | None = None,
        **kwargs: Any,
    ) -> dspy.Module:
        """Learn instructions and weights together; `student` itself is not changed, and `policy.lm` answers as before.

        Args:
            student: A program whose predictors use one policy's `lm`.
            trainset: Examples to learn from.
            teacher: Another program on the same policy, or several: better prompted, with demos, or at another policy
                version (`policy.lm_at`). Their rollouts join every group of the slow steps, and are trained on.
            valset: Examples to choose the best pair on. None: a seeded fifth of `trainset` is held out.
            student_follows: Whether `policy.lm`, and with it the student, serves the new versions while they are
                learned, and stays at the best one.
            seed: Over the optimizer's own, for this run; DSPy's optimizers take it in either place.
            num_threads: Likewise.
            kwargs: Refused, with what is meant.

        Returns:
            A copy with the best candidate's instructions, its LM serving the best policy version, and
            `detailed_results`, a `CompileResult`, unless `track_stats` is False.

        Raises:
            UserError: something about the student, the data, the metric or the run directory is wrong; at most the dry
                run's two rollouts were spent.
            ProgramError: the program failed alike in every rollout of the dry run or of the first batch, or no rollout
                of the first cycle ended well.
            MetricError, EngineError, TrainingError, StorageError: a part broke; the last checkpoint stands.
            ReflectionError: the reflection LM failed at every call; see `fast.on_reflection_failure`.
            Paused: a monitor with `pause` saw what it watches for.
        """
        check_keywords(kwargs, inspect.signature(self.compile).parameters, inspect.signature(FST).parameters)
        FSTArguments(student_follows=student_follows)
        given = self.check(student, trainset, teacher, valset, seed=seed, num_threads=num_threads)
        if (stage_rollouts := given.config.budget.stage_rollouts) is not None:
            raise UserError(f"budget.stage_rollouts is {stage_rollouts}: call compile_stream, or leave it out")
        return self._compiled(given, student_follows=student_follows)

    def compile_stream(
        self,
        student: dspy.Module,
        stages: Sequence[tuple[str, Sequence[dspy.Example]]],
        *,
        valsets: Mapping[str, Sequence[dspy.Example]] | None = None,
    ) -> dspy.Module:
        """Learn several tasks one after the other, under one metric, in one uninterrupted run.

        Each stage has `budget.stage_rollouts`; weights, population and optimizer go on from stage to stage. The
        optimizer sees the examples alone: a switch is noticed from rewards and feedback, or not. No validation score
        chooses anything, and the pair that is returned is the last one. Lines of `metrics.jsonl` have `stage`, and
        where a switch was noticed `switch`; `result.json` has `stages`, with the scores on all stages after each.

        Args:
            student: As for `compile`; its instructions should tell of no task.
            stages: Name and trainset of each, in order. The names are for the record.
            valsets: Examples of every stage, by its name. None: a seeded fifth of every trainset is held out.

        Returns:
            As `compile` does.

        Raises:
            UserError: as `compile` does; also for `budget.max_rollouts`, `max_steps` and `patience`, since only the
                stages end a stream.
            Others: as `compile` does.
        """
        found = stages_of(stages, valsets, self.config.seed)
        train, val = ([item.example for item in items] for items in (found[0].train, found[0].val))
        given = self.check(student, train, None, val)
        config = stream_config(given.config, len(found))
        return self._compiled(replace(given, config=config, train=found[0].train, val=found[0].val, stages=found))

    def distill(
        self,
        program: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example] | None = None,
        instructions: Mapping[str, str] | None = None,
    ) -> dspy.Module:
        """Teach the policy to do without a compiled program's long prompt: its instructions go into the weights.

        The teacher is the program as it is, and is not changed. The student begins with the same weights, under the
        instructions from before `program` was compiled; it samples, and learns at each of its tokens what the teacher
        would have said (reverse KL). The run directory is one like any other; its `result.json` has besides
        `distilled_from`, `teacher_score`, `tokens_per_answer` and `token_entropy`. `config.method` is not looked at.

        Args:
            program: What `compile` or `load` returned.
            trainset: Examples; no answer in them is looked at but by the metric, for the record.
            valset: Examples to score teacher and student on. None: a seeded fifth of `trainset` is held out.
            instructions: Others for the student, by predictor. None, and for predictors that are not named: those
                that `program` was compiled from, which a program of `load` does not know. Predictors whose calls do
                not train the policy keep theirs.

        Returns:
            A copy with the student's instructions, its LM serving the best version, and `detailed_results`.

        Raises:
            NotDistilled: the student keeps too little of the prompt's gain (`distill.keep_gain`), or too little entropy
                (`distill.min_entropy`). The run directory has no result then, and can be resumed.
            Others: as `compile` does; UserError also for a call that cannot be rendered under the teacher's prompt.
        """
        given = self.check(program, trainset, None, valset)
        seed, origin = before_compiling(program)
        config = given.config.with_values({"method": "rl"})
        texts = short_texts(program, self.seed_instructions or seed, instructions, config, "instructions")
        teacher, student = Candidate(seed_texts(program)), Candidate(texts)
        origin = {"policy_version": given.start_version, **origin, **(self.distilled_from or {})}
        lesson = Lesson(teacher, student, given.start_version, {**origin, "candidate": dict(teacher.texts)})
        return self._compiled(replace(given, config=config, student=apply_texts(program, texts), lesson=lesson))

    def _compiled(self, given: Given, *, student_follows: bool = False) -> dspy.Module:
        """What `compile` returns for what it was given."""
        run_dir = self.run_dir or new_run_dir(type(given.student).__name__)
        goes_on = self.resume and RunFiles(run_dir).state.exists()
        with given.policy.jobs.compiling(), kept_warnings() as warnings:
            found = self._dry_run(given) if given.config.run.dry_run and not goes_on else None
            if found:
                found.refuse()
            check_run_dir(run_dir, resume=self.resume)  # before the lock makes the directory
            with locked(run_dir), given.policy.lm_following() if student_follows else nullcontext():
                compiled = self._run(run_dir, given, found, warnings)
        if alarms := compiled.detailed_results.result["alarms"]:
            logger.warning("in this run: %s", "; ".join(alarms))
        if not self.track_stats:
            del compiled.detailed_results
        return compiled

    def dry_run(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
    ) -> DryRun:
        """What `compile` begins with: the student on two training examples, one call of the reflection LM, the plan.

        Nothing is written. `refuse()` on what it returns raises what `compile` would.
        """
        return self._dry_run(self.check(student, trainset, teacher, valset))

    def check(
        self,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        *,
        seed: int | None = None,
        num_threads: int | None = None,
    ) -> Given:
        """What `compile` would work with; nothing is spent or written.

        Raises:
            UserError: as `compile` does.
        """
        keep_keys_of(student, teacher, self.reflection_lm, dspy.settings.lm)
        config = by_arguments(self.config, seed=seed, num_threads=num_threads)
        policy, start_version = checked_student(student)
        check_roles(seed_texts(student), config)
        if config.train.credit == "predictor" and not self.metric.per_predictor:
            raise UserError(
                "train.credit is 'predictor', and the metric takes two arguments: give it five (example, prediction, "
                "trace, pred_name, pred_trace), so that it can score each predictor, or set train.credit='rollout'"
            )
        teachers = checked_teachers(teacher, policy)
        train, val = split_data(trainset, valset, config.seed)
        return Given(config, student, self.task or type(student).__name__, policy, start_version, train, val, teachers)

    def _dry_run(self, given: Given) -> DryRun:
        program, reflector = attach_policy(given.student, given.policy), reflector_of(self.reflection_lm, given.config)
        collector = collector_of(program, given, self.metric, Meter(given.config.budget, reflector))
        return dry_run(collector, reflector, given, len(self.testset or ()), self.run_dir, resume=self.resume)

    def _run(self, run_dir: Path, given: Given, found: DryRun | None, warnings: KeptWarnings) -> dspy.Module:
        """Cycles from the first or the last committed state to the end, and the compiled program."""
        files, resuming = open_run(run_dir, resume=self.resume)
        policy, start = given.policy, given.start_version
        changes = self._describe(files, given, resuming)
        if not resuming:
            policy.restore(start, policy.tensors(start) if start else None)
        program = attach_policy(given.student, policy)
        with shown(self.progress) as display:
            display.say(f"run directory: {run_dir}")
            run = replace(self.prepare(program, given, files, display), warnings=warnings)
            state = run.saver.resume(changed=bool(changes)) if resuming else first_state(run, program, found)
            compiled = self._cycles(run, given, state, resumed=resuming)
            next_steps = from_python(run_dir, type(given.student), path_to_say(policy.source))
            display.conclude(compiled.detailed_results.result, next_steps)
        return compiled

    def _cycles(self, run: Run, given: Given, state: State, *, resumed: bool) -> dspy.Module:
        try:
            run.begin(state, test=len(self.testset or ()), resumed=resumed)
            if given.lesson:
                state = distill(run, state, given.lesson, self.testset)
            else:
                state = start(run, state, self.testset)
                while not state.over:
                    state = run_cycle(run, state)
            return self._finish(given, run, state)
        except KeyboardInterrupt:
            again = "interrupted; go on from here with FST(..., run_dir=%r, resume=True)"
            logger.warning(again, str(run.files.root), extra=FROM_PYTHON)
            raise
        finally:
            run.saver.close()

    def _describe(self, files: RunFiles, given: Given, resuming: bool) -> list[str]:
        """Write `config.json`; what a resumed run has otherwise than it began with."""
        description = record.describe_run(
            *(given.config, given.policy, given.task, given.train, given.val, self.testset, given.teachers),
            start_version=given.start_version,
        )
        description["program"] = {
            "instructions": seed_texts(given.student),
            "reflection_lm": name_of(self.reflection_lm, given.policy),
            **({GIVEN: True} if self.instructions_given else {}),
        }
        if given.stages:
            description["data"]["stages"] = described(given.stages)
        if given.lesson:
            description["distilled_from"] = dict(given.lesson.origin)
        if not resuming:
            write_json(files.config, {**description, "run_id": uuid4().hex})
            return []
        before = read_config(files.config)
        record.check_same_kind(before, description)
        changes = record.changes(before, description)
        record.check_same_run(changes, allowed=self.allow_changes)
        if changes:
            every = [*before.get("changes", []), *changes]
            write_json(files.config, {**description, "run_id": record.run_id(files), "changes": every})
        return changes

    def prepare(self, program: dspy.Module, given: Given, files: RunFiles, *listeners: Callback) -> Run:
        """The parts that do the work, put together. `program`: the student with its LMs on its predictors."""
        policy, config = given.policy, given.config
        reflector = reflector_of(self.reflection_lm, config)
        meter = Meter(config.budget, reflector)
        collector = collector_of(program, given, self.metric, meter)
        trainer = trainer_of(given)
        metrics = MetricsLog(files.metrics, (*listeners, *self.listeners))
        payers = (collector, reflector) if isinstance(reflector, LMReflector) else (collector,)
        return Run(
            config=config,
            policy=policy,
            collector=collector,
            trainer=trainer,
            meter=meter,
            reflector=reflector,
            components=components_of(given),
            root=Candidate(seed_texts(given.student)),
            teachers=given.teachers,
            trainset=given.train,
            valset=given.val,
            stages=given.stages,
            files=files,
            metrics=metrics,
            saver=Saver(
                files, policy, trainer, metrics, meter, payers, config.run.keep_checkpoints, record.run_id(files)
            ),
        )

    def _finish(self, given: Given, run: Run, state: State) -> dspy.Module:
        """The compiled program, on disk and in hand."""
        policy, best, more = run.policy, state.best, dict[str, Any]()
        if given.lesson:
            state, more = gate(run, state, given.lesson)
        version = best.policy_version
        policy.restore(version, policy.tensors(version) if version else None)
        compiled = apply_texts(attach_policy(given.student, policy, version), best.candidate.texts)
        compiled._compiled = True
        record.save_program(compiled, run.files.program)
        # Before result.json, whose presence means finished: a crash while testing is mended by a resume.
        state, test_score = tested(run, state, self.testset)
        state = warned(run, state)  # what the last checkpoint came too early for
        result = record.result_of(given.config, given.task, state, run.metrics.time_s, test_score) | more
        if state.stream:
            result |= result_fields(run.stages, state.stream)
        sums = {path.name: checksum(path) for path in (run.files.program, run.files.config)}
        result["files"] = {**run.saver.adapter_checksums(version, *state.kept.values()), **sums}
        write_json(run.files.result, result)
        run.saver.finish()
        compiled.detailed_results = compile_result(run.files, result, state, compiled)
        return compiled
