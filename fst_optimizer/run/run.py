"""Everything that a run works with, and that its phases do not change: states are what changes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fst_optimizer.logs import KeptWarnings
from fst_optimizer.progress.plan import Plan
from fst_optimizer.store.metrics import start_fields
from fst_optimizer.store.tally import REMEDIES, Tally, commonest_failure

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.config.run import FSTConfig
    from fst_optimizer.data import Stage
    from fst_optimizer.distill.lesson import Lesson
    from fst_optimizer.evolve.reflect import Reflector
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.program.student import Teacher
    from fst_optimizer.rollout.collector import Collector
    from fst_optimizer.run.saver import Saver
    from fst_optimizer.run.state import State
    from fst_optimizer.store.files import RunFiles
    from fst_optimizer.store.meter import Meter
    from fst_optimizer.store.metrics import MetricsLog
    from fst_optimizer.train.trainer import Trainer
    from fst_optimizer.types import Candidate, Item

logger = logging.getLogger(__name__)

UNREAD = "no answer of a whole batch could be parsed"


@dataclass(frozen=True)
class Given:
    """What `compile` was given, checked."""

    config: FSTConfig
    """The optimizer's, with the seed and the threads that `compile` was given."""
    student: dspy.Module
    task: str
    """The name in `result.json`."""
    policy: Policy
    start_version: int
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    teachers: tuple[Teacher, ...]
    stages: tuple[Stage, ...] = ()
    """Of a stream; `train` and `val` are then the first one's."""
    lesson: Lesson | None = None
    """Of a distillation; the student then has the short prompt."""


@dataclass(frozen=True)
class Run:
    """One run: its settings, data, policy, and the parts that do the work."""

    config: FSTConfig
    policy: Policy
    collector: Collector
    meter: Meter
    """What has been spent."""
    trainer: Trainer | None
    """None when the method has no slow steps."""
    reflector: Reflector
    components: tuple[str, ...]
    """The predictors whose instructions may change."""
    root: Candidate
    """The program's own instructions."""
    teachers: tuple[Teacher, ...]
    """Programs that join every group of the slow steps."""
    trainset: tuple[Item, ...]
    valset: tuple[Item, ...]
    files: RunFiles
    metrics: MetricsLog
    saver: Saver
    warnings: KeptWarnings = field(default_factory=KeptWarnings)
    """What was warned of in this process."""
    stages: tuple[Stage, ...] = ()
    """Of a stream; `trainset` and `valset` are then the first one's."""

    def trainset_at(self, state: State) -> tuple[Item, ...]:
        """The examples to learn from."""
        return self.trainset if state.stream is None else self.stages[state.stream.stage].train

    def valset_at(self, state: State) -> tuple[Item, ...]:
        """The examples to validate on."""
        return self.valset if state.stream is None else self.stages[state.stream.stage].val

    def begin(self, state: State, *, test: int, resumed: bool) -> None:
        """Tell the callbacks what the run starts from, and what it has before it. `test`: examples in the test set."""
        plan = Plan.of(self.config, val=len(self.valset), test=test, teachers=len(self.teachers))
        self.metrics.tell("start", **start_fields(self.files.root, state, plan, resumed=resumed))

    def enter(self, phase: str, state: State) -> None:
        """Tell the callbacks that a phase begins."""
        number = state.phase if state.started and phase != "test" else 0
        at = {"cycle": state.cycle, "number": number, "step": state.step}
        self.metrics.tell("phase", phase=phase, **at, over=state.over, search_over=bool(state.search_over))

    def _told(self, state: State, text: str) -> bool:
        return any(text in one for one in (*state.warnings, *self.warnings.texts))

    def warn_once(self, state: State, text: str) -> None:
        """Warn, unless this run has said so."""
        if text and not self._told(state, text):
            logger.warning("%s", text)

    def log(self, kind: str, state: State, tally: Tally, **fields: Any) -> None:
        """Append a line to `metrics.jsonl`, with the counts of this moment. `tally`: how its rollouts ended.

        That not one answer of them could be parsed is warned of once in a run.
        """
        found = commonest_failure(tally.outcomes)
        if tally.unread and found and not self._told(state, UNREAD):
            logger.warning("%s (%d rollouts; %s): %s", UNREAD, tally.total, tally.first_error, REMEDIES[found[0]])
        self.metrics.line(
            kind,
            cycle=state.cycle,
            step=state.step,
            policy_version=state.policy_version,
            rollouts=self.meter.rollouts,
            **tally.to_json(),
            **({} if state.stream is None else {"stage": self.stages[state.stream.stage].name}),
            **fields,
        )
