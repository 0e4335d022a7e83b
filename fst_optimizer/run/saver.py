"""Saves a run: a checkpoint after each phase, and a journal of the rollouts and reflections of the phase after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fst_optimizer.run.checkpoint import Checkpoint, commit, restore
from fst_optimizer.run.state import State
from fst_optimizer.store.files import RunFiles
from fst_optimizer.store.journal import Journal
from fst_optimizer.store.meter import Meter
from fst_optimizer.store.metrics import MetricsLog

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.train.trainer import Trainer


class Journaled(Protocol):
    """Looks into the journal before it runs a rollout or asks an LM, and writes the answer down."""

    journal: Journal


@dataclass
class Saver:
    """Writes a run's states, and reads the last one back."""

    files: RunFiles
    policy: Policy
    trainer: Trainer | None
    """None when the method has no slow steps."""
    metrics: MetricsLog
    """Its size and clock are part of a checkpoint."""
    meter: Meter
    journaled: Sequence[Journaled]
    """They get the journal of each phase."""
    keep: int
    """Checkpoints that stay on disk."""
    run_id: str | None = None
    """The one in `config.json`. None in runs that an earlier version of this package began."""
    number: int = 0
    """Of the last checkpoint."""
    _journal: Journal = field(default_factory=Journal)
    _checksums: Mapping[str, str] = field(default_factory=dict)

    def commit(self, state: State) -> None:
        """Make `state` the one that a resume starts from.

        Raises:
            StorageError: It could not be written; the one before stands.
        """
        metrics_size, metrics_sha256 = self.metrics.sync()
        done = commit(
            self.files,
            state,
            self.number + 1,
            self.policy,
            self.trainer,
            elapsed_s=self.metrics.time_s,
            metrics_size=metrics_size,
            metrics_sha256=metrics_sha256,
            run_id=self.run_id,
            keep=self.keep,
            checksums=self._checksums,
        )
        self._go_on_from(done)

    def resume(self, *, changed: bool = False) -> State:
        """The last state that is whole; policy, trainer, metrics and meter are put back to it.

        With `changed` settings or data, the unfinished phase has other rollouts: its journal is removed.

        Raises:
            UserError: The run is of another format, or nothing of it is whole.
        """
        found = restore(self.files, self.policy, self.trainer, self.run_id)
        if changed:
            self.files.drop_journals()
        self._go_on_from(found)
        elapsed_s = max(found.elapsed_s, self._journal.last_s)
        self.metrics.resume(found.metrics_size, found.metrics_sha256, saved_s=found.elapsed_s, elapsed_s=elapsed_s)
        self.meter.resume(found.state, elapsed_s)
        return found.state

    def adapter_checksums(self, *versions: int) -> dict[str, str]:
        """Of the files of versions that the last checkpoint names, as they were when they were written."""
        folders = {self.files.policy(version).name for version in versions}
        return {name: value for name, value in self._checksums.items() if name.split("/")[-2] in folders}

    def close(self) -> None:
        """Make the journal safe on disk; nothing more is added to it."""
        self._journal.close()

    def finish(self) -> None:
        """The result is written: no resume will read the journals."""
        self.close()
        self.files.drop_journals()

    def _go_on_from(self, last: Checkpoint) -> None:
        self._journal.close()
        self.number, self._checksums = last.number, last.checksums
        path = self.files.journal(last.number)
        self._journal = Journal(path, clock=lambda: self.metrics.time_s, run_id=self.run_id)
        for one in self.journaled:
            one.journal = self._journal
