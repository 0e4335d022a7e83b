"""Runs programs on examples and returns rollouts: what was sampled, how it ended, what the metric said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any
from weakref import WeakSet

import dspy
import tqdm

from fst_optimizer.config.run import BudgetConfig, FSTConfig
from fst_optimizer.engines.recorder import name_components
from fst_optimizer.errors import EngineError, ProgramError
from fst_optimizer.keys import without_secrets
from fst_optimizer.policy.policy import Policy
from fst_optimizer.rollout.crashes import Crashes
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.outcome import mistake_in_program
from fst_optimizer.rollout.pool import run_jobs
from fst_optimizer.rollout.rerender import UnderTeacher
from fst_optimizer.rollout.rollout import Request, RolloutJob
from fst_optimizer.rollout.threads import stray_calls, watched
from fst_optimizer.rollout.usage import counting_strays
from fst_optimizer.store.journal import Journal
from fst_optimizer.store.meter import BudgetSpent, Meter
from fst_optimizer.types import Candidate, Item, Rollout, Usage

logger = logging.getLogger(__name__)

OnRollout = Callable[[Rollout], None]


class Collector:
    """Runs candidates' programs on examples under one policy.

    Args:
        build: Makes a candidate's own program instance, its LMs attached.
        policy: Whose calls are recorded.
        metric: Scores what the programs return.
        config: Has the seed, the number of threads and the time limits.
        meter: Counts what rollouts spend, and is asked before each one whether a cap is reached. None: no caps.
        must_work: A program that fails alike in every rollout of the first batch raises `ProgramError`. Otherwise that
            is data, as any failure is.
    """

    def __init__(
        self,
        build: Callable[[Candidate], dspy.Module],
        policy: Policy,
        metric: Metric,
        config: FSTConfig,
        meter: Meter | None = None,
        *,
        must_work: bool = False,
    ) -> None:
        self.build = build
        self.policy = policy
        self.metric = metric
        self.config = config
        self.meter = meter or Meter(BudgetConfig())
        self.journal = Journal()
        """Where rollouts are written down as they end, and found again by a run that is resumed."""
        self.strays = 0
        """Calls of the policy that came while rollouts ran, and from none of them."""
        self.crashes = Crashes(works=not must_work)
        _make_bars_forgiving()

    def run(
        self,
        requests: Sequence[Request],
        *,
        version: int,
        temperature: float,
        capture: bool = False,
        on_rollout: OnRollout | None = None,
        all_may_be_lost: bool = False,
        under_teacher: UnderTeacher | None = None,
    ) -> list[Rollout]:
        """Run all requests concurrently; the results are in the order of the requests.

        Args:
            requests: What to run; those of one candidate share its program.
            version: The policy version to sample from.
            temperature: For calls whose program does not ask for its own.
            capture: Also ask the metric for every predictor's score and feedback.
            on_rollout: Called in this thread as each one ends.
            all_may_be_lost: No error where the engine fails every one of them: others were answered before.
            under_teacher: Renders every call under a teacher's instructions too, for `Call.teacher_ids`.

        Raises:
            MetricError: The metric raised; the example is named.
            UserError: The metric did not return a finite number.
            BudgetSpent: A cap was reached on the way.
            StorageError: A rollout could not be written down.
            EngineError: The engine failed every single rollout; EngineDied: it is beyond repair.
            ProgramError: With `must_work`, the program failed alike in every rollout of the first batch.
        """
        programs: dict[str, dspy.Module] = {}
        for request in requests:
            if request.candidate.id not in programs:
                programs[request.candidate.id] = program = self.build(request.candidate)
                name_components(program)
        jobs = [
            RolloutJob(self, programs[one.candidate.id], one, version, temperature, capture, under_teacher)
            for one in requests
        ]
        rollouts = [job.from_journal() for job in jobs]
        missing = [index for index, rollout in enumerate(rollouts) if rollout is None]
        report = on_rollout or (lambda rollout: None)
        for rollout in filter(None, rollouts):
            report(rollout)
        results = run_jobs(
            [jobs[index] for index in missing],
            num_threads=self.config.rollout.num_threads,
            timeout_s=self.config.rollout.timeout_s,
            clock=self._clock,
            halted=lambda: bool(self.meter.reached()),
            grace_s=self.config.run.grace_s if self.journal.path else 0.0,  # else what ends is written down nowhere
        )
        with self._counting_strays(), closing(results):
            try:
                for place, rollout in results:
                    rollouts[missing[place]] = rollout
                    report(rollout)
            except KeyboardInterrupt as interrupt:
                results.throw(interrupt)  # it may have come while a result was looked at: the pool must know
        self.journal.sync()
        ended = [rollout for rollout in rollouts if rollout is not None]
        self.meter.batch_ended(ended)
        self._check_program([jobs[index] for index in missing], [rollouts[index] for index in missing], len(jobs))
        if len(ended) < len(jobs):
            raise BudgetSpent(self.meter.reached())
        if jobs and not all_may_be_lost and all(rollout.lost for rollout in ended):
            failed = jobs[missing[-1]].error
            raise EngineError(without_secrets(f"the engine failed all {len(jobs)} rollouts: {failed}")) from failed
        return ended

    def run_candidate(self, candidate: Candidate, items: Sequence[Item], **settings: Any) -> list[Rollout]:
        """Run one candidate once on every item; settings as of `run`."""
        return self.run([Request(candidate, item) for item in items], **settings)

    @contextmanager
    def _counting_strays(self) -> Iterator[None]:
        with counting_strays(self._add_stray), watched(self.policy) as count:
            try:
                yield
            finally:
                if count() and not self.strays:
                    logger.warning("%s", stray_calls(count()))
                self.strays += count()

    def _add_stray(self, usage: Mapping[str, Usage]) -> None:
        self.meter.add_usage(self.others(usage))

    def others(self, usage: Mapping[str, Usage]) -> dict[str, Usage]:
        """Usage without the policy's own, which costs no dollars."""
        own = self.policy.lm.model
        return {model: used for model, used in usage.items() if model != own}

    def note(self, rollout: Rollout, first: bool) -> None:
        """What is to be said of a rollout that ended; `first`: it is the first of the run that ended so."""
        if rollout.raised is None:
            return
        self.meter.add_crash(rollout.raised)
        if first:
            logger.warning(
                "the program raised on example %s: %s (at %s); what else fails is counted under outcomes in "
                "metrics.jsonl and result.json",
                *(rollout.example_id, " ".join(rollout.error.split())[:300], rollout.raised.place),
            )

    def _check_program(self, jobs: Sequence[RolloutJob], rollouts: Sequence[Rollout | None], whole: int) -> None:
        """Jobs that were run, with what came of them, None where a cap stopped them, of a batch of `whole`."""
        ran = [rollout for rollout in rollouts if rollout is not None]
        raised = self.crashes.mistake(
            ran,
            others=whole - len(jobs),
            num_threads=self.config.rollout.num_threads,
            known=self.meter.crashes,
        )
        if raised is not None:
            error = next(job.error for job in jobs if job.error)
            run_dir = self.journal.path.parents[1] if self.journal.path else None
            raise ProgramError(mistake_in_program(raised, len(ran), run_dir)) from error

    def _clock(self) -> float:
        """Seconds that stand still while the engine restarts: an outage does not count against a rollout's deadline."""
        return time.monotonic() - self.policy.engine.outage_s()


class _Bars(WeakSet[Any]):
    """tqdm's list of its bars, for which one that is gone already is no error."""

    def remove(self, item: Any) -> None:
        self.discard(item)


def _make_bars_forgiving() -> None:
    """Let programs that use `dspy.Parallel` run at the same time.

    It clears tqdm's list of bars whenever it starts (dspy 3.4.1), and a bar that another thread makes at that moment,
    shown or not, then fails with a KeyError.
    """
    if not isinstance(tqdm.tqdm._instances, _Bars):
        tqdm.tqdm._instances = _Bars(tqdm.tqdm._instances)
