"""What the training jobs of dspy's optimizers share when they run on one policy."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from fst_optimizer.policy.lm import PolicyLM


class TrainingJobs:
    """A policy's `jobs`: the lock on its trainable adapter, and the LM copies that must not move with the next job."""

    def __init__(self) -> None:
        self.training = threading.Lock()
        """Held while a job trains: the policy has one trainable adapter, so one job can use it at a time."""
        self._copies: WeakSet[PolicyLM] = WeakSet()
        self._copying = threading.Lock()

    def add_copy(self, lm: PolicyLM) -> None:
        """Remember an LM that was deep-copied with its program and is not at a version of its own."""
        with self._copying:
            self._copies.add(lm)

    def pin_copies(self) -> None:
        """Pin every remembered copy where it is: training moves the LM that is trained, no copy and no original of it.

        `BetterTogether` keeps a copy of the program from before each step and returns the best one, which must still
        have the weights that it was scored with.
        """
        with self._copying:
            copies = list(self._copies)
            self._copies.clear()
        for lm in copies:
            lm.stay_at(lm.version)
