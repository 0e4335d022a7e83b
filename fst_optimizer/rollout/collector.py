"""Runs programs on examples and returns rollouts: what was sampled, how it ended, what the metric said."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError
from dspy.utils.usage_tracker import UsageTracker

from fst_optimizer.config.run import BudgetConfig
from fst_optimizer.engines.recorder import COMPONENT, SETTING, Recorder, name_components
from fst_optimizer.errors import EngineError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.policy.policy import Policy
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.pool import run_jobs
from fst_optimizer.store.journal import Journal
from fst_optimizer.store.meter import BudgetSpent, Meter
from fst_optimizer.text import unicode_only, without_secrets
from fst_optimizer.types import Candidate, Group, Item, Outcome, Rollout, TraceStep, Usage

BuildProgram = Callable[[Candidate], dspy.Module]


@dataclass(frozen=True)
class Request:
    """One rollout to run."""

    candidate: Candidate
    item: Item
    index: int = 0
    """0 .. G-1 within its group; part of the sampling seed."""
    version: int | None = None
    """The policy version to sample from. None: that of the whole batch."""


class Collector:
    """Runs candidates' programs on examples under one policy.

    Args:
        build: Makes a candidate's own program instance, its LMs attached.
        policy: Whose calls are recorded.
        metric: Scores what the programs return.
        seed: The run's seed.
        num_threads: Rollouts in flight.
        timeout_s: Wall-clock limit of one rollout, in seconds.
        meter: Counts what rollouts spend, and is asked before each one whether a cap is reached. None: no caps.
        grace_s: How long rollouts in flight may go on after an interrupt, in seconds.
    """

    def __init__(
        self,
        build: BuildProgram,
        policy: Policy,
        metric: Metric,
        *,
        seed: int,
        num_threads: int,
        timeout_s: float,
        meter: Meter | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self.build = build
        self.policy = policy
        self.metric = metric
        self.seed = seed
        self.num_threads = num_threads
        self.timeout_s = timeout_s
        self.meter = meter or Meter(BudgetConfig())
        self.grace_s = grace_s
        self.journal = Journal()
        """Where rollouts are written down as they end, and those found that a run paid for before it was resumed."""
        _make_bars_forgiving()

    def run(
        self,
        requests: Sequence[Request],
        *,
        version: int,
        temperature: float,
        capture: bool = False,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Run all requests concurrently; the results are in the order of the requests.

        Args:
            requests: What to run.
            version: The policy version to sample from.
            temperature: For calls whose program does not ask for its own.
            capture: Also ask the metric for every predictor's score and feedback.
            on_rollout: Called in this thread as each one ends.

        Raises:
            MetricError: The metric raised; the example is named.
            UserError: The metric did not return a finite number.
            BudgetSpent: A cap was reached on the way.
            StorageError: A rollout could not be written down.
            EngineError: The engine failed every single rollout; EngineDied: it is beyond repair.
        """
        programs: dict[str, dspy.Module] = {}
        for request in requests:
            if request.candidate.id not in programs:
                programs[request.candidate.id] = self._program(request.candidate)
        jobs = [
            _Job(self, programs[request.candidate.id], request, version, temperature, capture) for request in requests
        ]
        rollouts = [job.found() for job in jobs]
        for rollout in filter(None, rollouts):
            if on_rollout:
                on_rollout(rollout)
        missing = [index for index, rollout in enumerate(rollouts) if rollout is None]
        with closing(
            run_jobs(
                [jobs[index] for index in missing],
                num_threads=self.num_threads,
                timeout_s=self.timeout_s,
                late=_Job.timed_out,
                clock=self._clock,
                halted=lambda: bool(self.meter.reached()),
                grace_s=self.grace_s,
            )
        ) as results:
            try:
                for place, result in results:
                    assert isinstance(result, Rollout)
                    rollouts[missing[place]] = result
                    if on_rollout:
                        on_rollout(result)
            except KeyboardInterrupt as interrupt:
                results.throw(interrupt)  # it may have come while a result was looked at: the pool must know
        self.journal.sync()
        if None in rollouts:
            raise BudgetSpent(self.meter.reached())
        if jobs and all(rollout and rollout.outcome is Outcome.ENGINE_ERROR for rollout in rollouts):
            failed = jobs[missing[-1]].error
            raise EngineError(f"the engine failed all {len(jobs)} rollouts: {failed}") from failed
        return [rollout for rollout in rollouts if rollout is not None]

    def _clock(self) -> float:
        """Seconds that stand still while the engine is brought back: that is not the rollouts' time."""
        return time.monotonic() - self.policy.engine.outage_s()

    def _program(self, candidate: Candidate) -> dspy.Module:
        program = self.build(candidate)
        name_components(program)
        return program


class _Bars(WeakSet[Any]):
    """tqdm's list of its bars, for which one that is gone already is no error."""

    def remove(self, item: Any) -> None:
        self.discard(item)


def _make_bars_forgiving() -> None:
    """Let programs that use `dspy.Parallel` run at the same time.

    It clears tqdm's list of bars whenever it starts (dspy 3.4.1), and a bar that another thread makes at that moment,
    shown or not, then fails with a KeyError.
    """
    import tqdm

    if not isinstance(tqdm.tqdm._instances, _Bars):
        tqdm.tqdm._instances = _Bars(tqdm.tqdm._instances)


def grouped(rollouts: Sequence[Rollout]) -> tuple[Group, ...]:
    """All rollouts of one example are one group, across candidates; examples in order of appearance."""
    by_example: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_example[rollout.example_id].append(rollout)
    return tuple(Group(example_id, tuple(members)) for example_id, members in by_example.items())


class _Job:
    """One rollout, run in a pool thread."""

    def __init__(
        self,
        collector: Collector,
        program: dspy.Module,
        request: Request,
        version: int,
        temperature: float,
        capture: bool,
    ) -> None:
        self.collector = collector
        self.program = program
        self.request = request
        self.version = version = version if request.version is None else request.version
        self.capture = capture
        key = (collector.seed, version, request.candidate.id, request.item.id, request.index)
        self.recorder = Recorder(collector.policy, version, temperature, seed_key=key)
        self.trace: list[Any] = []
        self.tracker = UsageTracker()
        self.error: Exception | None = None
        self.key = (version, request.candidate.id, request.item.id, request.index, temperature, capture)
        self._lock = threading.Lock()
        self._settled: Rollout | None = None
        self._dropped = False

    def found(self) -> Rollout | None:
        """The rollout, where it was paid for before the run was resumed."""
        rollout = self.collector.journal.rollout(self.key)
        if rollout is not None:
            self.collector.meter.add(rollout)
        return rollout

    def run(self) -> Rollout:
        started = time.monotonic()
        prediction = self._run_program()
        if self.recorder.died:
            raise self.recorder.died
        error, outcome = self.error, _outcome(self.error, self.recorder)
        score = 0.0
        feedback: dict[str, str] = {}
        own_scores: dict[str, float] = {}
        if outcome is Outcome.OK:
            score, feedback, own_scores = self._judge(prediction, self.trace)
        elif self.capture:
            feedback = {"": describe_failure(outcome, error)}
        rollout = self._rollout(
            outcome,
            score=score,
            feedback=feedback,
            predictor_scores=own_scores,
            trace=_steps(self.trace, self.recorder, self._unparsed()),
            error="" if error is None else describe_failure(outcome, error),
            seconds=time.monotonic() - started,
        )
        return self._settle(rollout)

    def stop(self) -> None:
        with self._lock:
            self._dropped = self._settled is None
        self.recorder.cancel()

    def timed_out(self, seconds: float) -> Rollout:
        rollout = self._rollout(
            Outcome.TIMEOUT,
            trace=_steps(tuple(self.trace), self.recorder, None),
            feedback={"": f"The program took longer than {seconds:g} s."},
            error=f"timed out after {seconds:g} s",
            seconds=seconds,
        )
        return self._settle(rollout)

    def _settle(self, rollout: Rollout) -> Rollout:
        """Count it and write it down, once: a rollout that was given up may still end.

        Here, not where results are read: the next rollout of this thread must find it counted, and a process that is
        killed must have it on disk.
        """
        with self._lock:
            if self._settled is not None or self._dropped:
                return self._settled or rollout
            self._settled = rollout = failpoint("rollout.end", rollout)
        self.collector.meter.add(rollout)
        if rollout.outcome is not Outcome.ENGINE_ERROR:  # else a run that died of its engine would die of it again
            self.collector.journal.add_rollout(self.key, rollout)
        return rollout

    def _rollout(self, outcome: Outcome, *, score: float = 0.0, **rest: Any) -> Rollout:
        return Rollout(
            candidate_id=self.request.candidate.id,
            example_id=self.request.item.id,
            index=self.request.index,
            policy_version=self.version,
            outcome=outcome,
            score=score,
            calls=tuple(self.recorder.calls),
            usage=self._usage(),
            **rest,
        )

    def _usage(self) -> dict[str, Usage]:
        """What LMs besides the policy were asked, a judge's calls included."""
        own = self.collector.policy.lm.model
        spent = {model: tuple(entries) for model, entries in tuple(self.tracker.usage_data.items()) if model != own}
        return {model: usage_of(entries) for model, entries in spent.items()}

    def _run_program(self) -> Any:
        settings = {
            SETTING: self.recorder,
            "trace": self.trace,
            "usage_tracker": self.tracker,
            "disable_history": True,
            "adapter": strict_adapter(),
        }
        inputs = self.request.item.example.inputs()
        with dspy.context(**settings):
            try:
                if hasattr(type(self.program), "forward"):
                    return self.program(**inputs)
                return asyncio.run(self.program.acall(**inputs))
            except Exception as error:
                self.error = error
                return None

    def _unparsed(self) -> TraceStep | None:
        """The turn that did not parse, which dspy's trace lacks."""
        if not isinstance(self.error, AdapterParseError):
            return None
        place = _unparsed_call(self.error, self.recorder)
        if place is not None:
            call = self.recorder.calls[place]
            return TraceStep(call.predictor, {"prompt": self.recorder.prompts[place]}, None, call.text)
        return TraceStep(_component_of(self.error.signature, self.program), {}, None, str(self.error.lm_response))

    def _judge(self, prediction: Any, trace: list[Any]) -> tuple[float, dict[str, str], dict[str, float]]:
        """The program's score; with `capture` also each predictor's own, and the feedback.

        The recorder is hidden meanwhile: calls of a judge are not the program's, even when the judge is this policy.
        """
        metric, item = self.collector.metric, self.request.item
        with dspy.context(**{SETTING: None, "trace": None, "usage_tracker": self.tracker}):
            whole = metric.judge(item.example, prediction, where=item.id)
            feedback, scores = {"": whole.feedback}, {}
            if self.capture and metric.per_predictor:
                for name in dict.fromkeys(getattr(step[0], COMPONENT, "") for step in trace):
                    own = [step for step in trace if getattr(step[0], COMPONENT, "") == name]
                    judged = metric.judge(
                        item.example, prediction, where=item.id, trace=trace, pred_name=name, pred_trace=own
                    )
                    feedback[name], scores[name] = judged.feedback, judged.score
        return whole.score, feedback, scores


def strict_adapter() -> Any:
    """The configured prompt format, without the silent second call in JSON after a failed parse."""
    adapter = dspy.settings.adapter
    if adapter is None:
        return dspy.ChatAdapter(use_json_adapter_fallback=False)
    if getattr(adapter, "use_json_adapter_fallback", False):
        import copy

        adapter = copy.copy(adapter)
        adapter.use_json_adapter_fallback = False
    return adapter


def _outcome(error: Exception | None, recorder: Recorder) -> Outcome:
    if error is None:
        return Outcome.OK
    if isinstance(error, AdapterParseError):  # whatever was refused before it, the program lived through
        place = _unparsed_call(error, recorder)
        cut = place is not None and recorder.calls[place].finish_reason == "length"
        return Outcome.TRUNCATED if cut else Outcome.PARSE_ERROR
    if recorder.failure is None and isinstance(error, LMError) and not isinstance(error, ContextWindowExceededError):
        return Outcome.ENGINE_ERROR  # an LM that is not trained could not be reached: not the policy's doing
    return recorder.failure or Outcome.PROGRAM_ERROR


def _unparsed_call(error: AdapterParseError, recorder: Recorder) -> int | None:
    """Which call's text did not parse: not always the last, where a program calls in parallel; None: another LM's."""
    calls = tuple(recorder.calls)
    text = str(error.lm_response).strip()
    if not text:
        return len(calls) - 1 if calls else None
    return next((place for place in reversed(range(len(calls))) if text in calls[place].text), None)


def _component_of(signature: Any, program: dspy.Module) -> str:
    """The predictor with this signature, or "" where that does not tell."""
    fitting = [name for name, predictor in program.named_predictors() if predictor.signature.equals(signature)]
    return fitting[0] if len(fitting) == 1 else ""


def usage_of(entries: Sequence[Mapping[str, Any]]) -> Usage:
    """The entries that dspy kept of one model, one a call, summed."""
    return Usage(
        calls=len(entries),
        prompt_tokens=sum(entry.get("prompt_tokens") or 0 for entry in entries),
        cached_tokens=sum((entry.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for entry in entries),
        completion_tokens=sum(entry.get("completion_tokens") or 0 for entry in entries),
    )


def describe_failure(outcome: Outcome, error: Exception | None) -> str:
    """What went wrong, for people and for the reflector."""
    if isinstance(error, AdapterParseError):
        fields = ", ".join(f"`{name}`" for name in error.signature.output_fields)
        cut = " It was cut at max_tokens." if outcome is Outcome.TRUNCATED else ""
        return f"The answer could not be parsed.{cut} It must give the fields {fields} in the format asked for."
    return unicode_only(without_secrets(f"{type(error).__name__}: {error}")) if error else str(outcome)


def _steps(trace: Sequence[Any], recorder: Recorder, unparsed: TraceStep | None) -> tuple[TraceStep, ...]:
    """The trace that dspy kept, with the policy's raw completions, and last the turn that did not parse."""
    texts: dict[str, list[str]] = defaultdict(list)
    for call in recorder.calls:
        texts[call.predictor].append(call.text)
    taken: dict[str, int] = defaultdict(int)
    steps = []
    for predictor, inputs, outputs in trace:
        name = getattr(predictor, COMPONENT, "")
        own, place = texts[name], taken[name]
        taken[name] += 1
        completion = own[place] if place < len(own) else ""
        steps.append(TraceStep(name, dict(inputs), dict(outputs), completion))
    return (*steps, unparsed) if unparsed else tuple(steps)
