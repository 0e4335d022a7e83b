"""Who may train a policy: one compile, or one job of dspy's optimizers at a time; and what those jobs share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from fst_optimizer.errors import UserError

if TYPE_CHECKING:
    from fst_optimizer.policy.lm import PolicyLM


class TrainingJobs:
    """A policy's `jobs`: the lock on its trainable adapter, and the LM copies that must not move with the next job."""

    def __init__(self) -> None:
        self.training = threading.Lock()
        """Held by a compile, and while a job trains: the policy has one trainable adapter."""
        self.compiles = 0
        """How many compiles have begun on this policy."""
        self._compiling = False
        self._between_steps: WeakKeyDictionary[object, threading.Thread] = WeakKeyDictionary()
        self._copies: WeakSet[PolicyLM] = WeakSet()
        self._copying = threading.Lock()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Inside, nothing else may train the policy. It waits for nothing: what goes on may be what called it.

        Raises:
            UserError: A compile or a job trains it already, in another thread or around this call.
        """
        here = threading.current_thread()
        # A job whose thread has ended, or has come to this call, is over or idle, even where nobody said so.
        others = [one for one in tuple(self._between_steps.values()) if one is not here and one.is_alive()]
        if others or not self.training.acquire(blocking=False):
            who = "another compile" if self._compiling else "a job of one of DSPy's optimizers"
            raise UserError(
                f"student is on a Policy that {who} is training, and two would mix their weights: wait until that has "
                "ended, or give this student a Policy of its own"
            )
        self._compiling = True
        self.compiles += 1
        try:
            yield
        finally:
            self._compiling = False
            self.training.release()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, a job trains. Jobs wait for each other.

        Raises:
            UserError: A compile trains the policy.
        """
        self.check_no_compile()
        while not self.training.acquire(timeout=0.2):
            self.check_no_compile()
        try:
            yield
        finally:
            self.training.release()

    def check_no_compile(self) -> None:
        """Raises UserError where a compile trains the policy: a job that waited for it would begin from old weights."""
        if self._compiling:
            raise UserError(
                "the LM is on a Policy that FST.compile is training, and a job beside it would mix their weights: wait "
                "until that has ended, or use an LM of another Policy"
            )

    def begin(self, job: object) -> None:
        """A job begins that trains step by step, in this thread."""
        self.check_no_compile()
        self._between_steps[job] = threading.current_thread()

    def end(self, job: object) -> None:
        """It takes no further step."""
        self._between_steps.pop(job, None)

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
