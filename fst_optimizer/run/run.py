"""Everything that a run works with, and that its phases do not change: states are what changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fst_optimizer.logs import KeptWarnings

if TYPE_CHECKING:
    from fst_optimizer.config.run import FSTConfig
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
    from fst_optimizer.types import Item


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
    teachers: tuple[Teacher, ...]
    """Programs that join every group of the slow steps."""
    trainset: tuple[Item, ...]
    valset: tuple[Item, ...]
    files: RunFiles
    metrics: MetricsLog
    saver: Saver
    warnings: KeptWarnings = field(default_factory=KeptWarnings)
    """What was warned of in this process."""

    def log(self, kind: str, state: State, **fields: Any) -> None:
        """Append a line to `metrics.jsonl`, with the counts of this moment."""
        self.metrics.line(
            kind,
            cycle=state.cycle,
            step=state.step,
            policy_version=state.policy_version,
            rollouts=self.meter.rollouts,
            **fields,
        )
