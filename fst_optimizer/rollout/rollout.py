"""One rollout: a candidate's program run on one example in a pool thread, recorded, scored and written down."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from fst_optimizer.engines.recorder import COMPONENT, SETTING, Recorder
from fst_optimizer.failpoints import failpoint
from fst_optimizer.keys import without_keys
from fst_optimizer.rollout.outcome import describe_failure, outcome_of, raise_ctrl_c, raised_by, unparsed_call
from fst_optimizer.rollout.rerender import UnderTeacher
from fst_optimizer.rollout.threads import inherited_by_threads
from fst_optimizer.rollout.usage import TRACKER, CallTracker
from fst_optimizer.types import Call, Candidate, Item, Outcome, Rollout, TraceStep, Usage

if TYPE_CHECKING:
    from fst_optimizer.rollout.collector import Collector
    from fst_optimizer.store.journal import Journal


@dataclass(frozen=True)
class Request:
    """One rollout to run."""

    candidate: Candidate
    item: Item
    index: int = 0
    """0 .. G-1 within its group; part of the sampling seed."""
    version: int | None = None
    """The policy version to sample from. None: that of the whole batch."""
    draw: str = ""
    """Which drawing of the same rollout this is, as in `step 12`: another one samples other texts. "": the same texts
    whenever it is asked for, as in evaluations."""


class RolloutJob:
    """Runs one request: a job of `pool.run_jobs`.

    Args:
        collector: Has the policy, the metric, the journal and the meter.
        program: The candidate's program; other jobs may run it at the same time.
        request: What to run.
        version: The policy version to sample from, unless the request names its own.
        temperature: For calls whose program does not ask for its own.
        capture: Also ask the metric for every predictor's score and feedback.
        under_teacher: Renders the calls under a teacher's instructions too.
    """

    def __init__(
        self,
        collector: Collector,
        program: dspy.Module,
        request: Request,
        version: int,
        temperature: float,
        capture: bool,
        under_teacher: UnderTeacher | None = None,
    ) -> None:
        self.collector = collector
        self.program = program
        self.request = request
        self.version = version if request.version is None else request.version
        self.capture = capture
        self.error: BaseException | None = None
        """What the program raised."""
        key = (self.version, request.candidate.id, request.item.id, request.index)
        draw = (request.draw,) if request.draw else ()
        self._journal_key = (*key, temperature, capture, *draw)
        seed_key = (collector.config.seed, *key, *draw)
        self._recorder = Recorder(
            collector.policy, self.version, temperature, seed_key=seed_key, under_teacher=under_teacher
        )
        self._trace: list[Any] = []
        self._tracker = CallTracker()
        self._lock = threading.Lock()
        self._settled: Rollout | None = None
        self._dropped = False

    def from_journal(self) -> Rollout | None:
        """The rollout, where it ended before the run was resumed."""
        rollout = self.collector.journal.rollout(self._journal_key)
        if rollout is not None:
            self.collector.note(rollout, self.collector.meter.add(rollout))
        return rollout

    def run(self) -> Rollout:
        """Run the program and score what it returned.

        Raises:
            EngineDied: The engine is beyond repair, whether or not the program caught that.
            MetricError: The metric raised.
            UserError: It did not return a finite number, or a call asked for what the policy cannot do.
        """
        with inherited_by_threads():
            return self._run()

    def _run(self) -> Rollout:
        started = time.monotonic()
        prediction = self._run_program()
        self._recorder.cancel()  # a thread that goes on may not sample for a rollout that has ended
        if fatal := self._recorder.died or self._recorder.refused:
            raise fatal
        outcome = outcome_of(self.error, self._recorder)
        error = "" if self.error is None else describe_failure(outcome, self.error)
        judged: dict[str, Any] = {"feedback": {"": error}} if self.capture else {}
        if outcome is Outcome.OK:
            judged = self._judge(prediction)
        raised = raised_by(self.error) if self.error and outcome is Outcome.PROGRAM_ERROR else None
        return self._settle(outcome, error=error, raised=raised, seconds=time.monotonic() - started, **judged)

    def stop(self) -> None:
        """Refuse further LM calls; what has not been recorded by now is dropped."""
        with self._lock:
            self._dropped = self._settled is None
        self._recorder.cancel()

    def timed_out(self, seconds: float) -> Rollout:
        """The result of a rollout that missed its deadline of `seconds`."""
        return self._settle(
            Outcome.TIMEOUT,
            feedback={"": f"The program took longer than {seconds:g} s."},
            error=f"timed out after {seconds:g} s",
            seconds=seconds,
        )

    def _settle(self, outcome: Outcome, *, score: float = 0.0, **rest: Any) -> Rollout:
        """Make the rollout, count it and write it down, once: one that timed out may still end.

        Here, not where results are read: the next rollout of this thread must find it counted, and a process that is
        killed must have it on disk.
        """
        rollout = Rollout(
            candidate_id=self.request.candidate.id,
            example_id=self.request.item.id,
            index=self.request.index,
            policy_version=self.version,
            outcome=outcome,
            score=score,
            calls=tuple(map(_without_keys, tuple(self._recorder.calls))),
            trace=self._steps(),
            usage=self._usage(),
            **rest,
        )
        with self._lock:
            if self._settled is not None or self._dropped:
                self._spend(rollout.usage)  # the rollout is not counted, or has been; these dollars are spent
                return self._settled or rollout
            self._settled = rollout = failpoint("rollout.end", rollout)
        first = self.collector.meter.add(rollout)
        self.collector.crashes.ended(rollout, partial(self._write_down, rollout, first, self.collector.journal))
        return rollout

    def _write_down(self, rollout: Rollout, first: bool, journal: Journal) -> None:
        self.collector.note(rollout, first)
        over = journal is not self.collector.journal  # a checkpoint has it
        if not over and rollout.outcome is not Outcome.ENGINE_ERROR:  # a resumed run tries again what the engine failed
            journal.add_rollout(self._journal_key, rollout)

    def _usage(self) -> dict[str, Usage]:
        """What LMs besides the policy were asked so far, a judge's calls included; later calls count at once."""
        return self.collector.others(self._tracker.close(self._spend))

    def _spend(self, usage: Mapping[str, Usage]) -> None:
        self.collector.meter.add_usage(self.collector.others(usage))

    def _run_program(self) -> Any:
        settings = {
            SETTING: self._recorder,
            "trace": self._trace,
            "usage_tracker": self._tracker,
            TRACKER: self._tracker,
            "disable_history": True,
            # dspy.asyncify has one anyio limiter for all event loops, which cannot wake who waits in another loop (dspy
            # 3.4.1): programs would hang as soon as one had to wait.
            "async_max_workers": 1 << 20,
            "adapter": strict_prompt_format(),
        }
        if self._recorder.under_teacher is not None:
            settings["callbacks"] = [*(dspy.settings.callbacks or []), self._recorder.under_teacher]
        inputs = self.request.item.example.inputs()
        with dspy.context(**settings):
            try:
                if hasattr(type(self.program), "forward"):
                    return self.program(**inputs)
                return asyncio.run(self.program.acall(**inputs))
            except BaseException as error:  # sys.exit() in a program must not end the run, as a success at that
                raise_ctrl_c(error)
                self.error = error
                return None

    def _judge(self, prediction: Any) -> dict[str, Any]:
        """The program's `score`, the `feedback` and, with `capture`, the `predictor_scores`.

        The recorder is hidden meanwhile: calls of a judge are not the program's, even when the judge is this policy.
        """
        metric, item = self.collector.metric, self.request.item
        with dspy.context(**{SETTING: None, "trace": None, "usage_tracker": self._tracker}):
            whole = metric.judge(item, prediction)
            feedback, scores = {"": whole.feedback}, {}
            if self.capture and metric.per_predictor:
                turns: dict[str, list[Any]] = defaultdict(list)
                for turn in self._trace:
                    turns[getattr(turn[0], COMPONENT, "")].append(turn)
                for name, own in turns.items():
                    judged = metric.judge(item, prediction, self._trace, name, own)
                    feedback[name], scores[name] = judged.feedback, judged.score
        return {"score": whole.score, "feedback": feedback, "predictor_scores": scores}

    def _steps(self) -> tuple[TraceStep, ...]:
        """The trace that dspy kept, with the policy's raw completions, and last the turn that did not parse."""
        completions: dict[str, list[str]] = defaultdict(list)
        for call in reversed(tuple(self._recorder.calls)):
            completions[call.predictor].append(without_keys(call.text))
        steps = []
        for predictor, inputs, outputs in tuple(self._trace):  # a copy: after a timeout the program may still run
            name = getattr(predictor, COMPONENT, "")
            completion = completions[name].pop() if completions[name] else ""
            steps.append(TraceStep(name, dict(inputs), dict(outputs), completion))
        if isinstance(self.error, AdapterParseError):  # dspy's trace lacks the turn that did not parse
            steps.append(self._unparsed_turn(self.error))
        return tuple(steps)

    def _unparsed_turn(self, error: AdapterParseError) -> TraceStep:
        place = unparsed_call(error, self._recorder.calls)
        if place is not None:
            call = self._recorder.calls[place]
            return TraceStep(call.predictor, {"prompt": self._recorder.prompts[place]}, None, without_keys(call.text))
        fitting = [name for name, one in self.program.named_predictors() if one.signature.equals(error.signature)]
        return TraceStep(fitting[0] if len(fitting) == 1 else "", {}, None, without_keys(str(error.lm_response)))


def _without_keys(call: Call) -> Call:
    """A call whose text, which nothing is trained on, names no key that the prompt may have told the model."""
    text = without_keys(call.text)
    return call if text == call.text else replace(call, text=text)


def strict_prompt_format() -> Any:
    """The configured prompt format, without the silent second call in JSON after a failed parse."""
    adapter = dspy.settings.adapter
    if adapter is None:
        return dspy.ChatAdapter(use_json_adapter_fallback=False)
    if getattr(adapter, "use_json_adapter_fallback", False):
        adapter = copy.copy(adapter)
        adapter.use_json_adapter_fallback = False
    return adapter
