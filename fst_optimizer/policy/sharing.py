"""What the jobs on one policy share: its one trainable adapter, and the copies of its LM."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakSet

from fst_optimizer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.lm import PolicyLM
    from fst_optimizer.policy.policy import Policy


class Jobs:
    """A policy's `jobs`. It costs nothing while no job runs."""

    def __init__(self) -> None:
        self.training = threading.Lock()
        """Held while a job's weights are in the trainable adapter: there is only one."""
        self._copies: WeakSet[PolicyLM] = WeakSet()
        self._copying = threading.Lock()

    def add_copy(self, lm: PolicyLM) -> None:
        """Know of an LM that came with a deep copy of a program and follows the policy's current version."""
        with self._copying:
            self._copies.add(lm)

    def pin_copies(self, version: int, *, but: PolicyLM) -> None:
        """Let every such copy stay at `version`, as the copy of any other LM does when its original is trained.

        `BetterTogether` keeps a copy of the program from before each step, and returns the best: its weights must
        still be those that it was scored with.
        """
        with self._copying:
            copies = [lm for lm in self._copies if lm is not but]
            self._copies.clear()
        for lm in copies:
            lm.stay_at(version)


def trained_policy(lm: object, what: str) -> Policy:
    """The policy behind an LM that may be trained.

    Raises:
        UserError: An LM of another kind, or a frozen one.
    """
    from fst_optimizer.policy.lm import trainable_policy

    policy = trainable_policy(lm)
    if policy is None:
        frozen = " is a frozen use of a policy and" if hasattr(getattr(lm, "engine", None), "policy") else ""
        raise UserError(
            f"lm {getattr(lm, 'model', lm)!r}{frozen} cannot be trained by {what}: make a fst_optimizer.Policy(model) "
            "and call student.set_lm(policy.lm)"
        )
    return policy


def tensors_at(policy: Policy, version: int) -> dict[str, Tensor]:
    """The LoRA tensors of a served version; the base's add nothing.

    Raises:
        UserError: The version was retired.
    """
    if not version:
        return policy.zero_adapter
    if version not in policy.engine.versions():
        raise UserError(
            f"the LM is at policy version {version}, which {policy!r} does not serve any more: "
            "call student.set_lm(policy.lm)"
        )
    return policy.tensors(version)


def load(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into the trainable adapter; what is served does not change."""
    from fst_optimizer.model import lora

    with policy.lock:
        lora.restore(policy.model, tensors)


def publish_next(policy: Policy) -> int:
    """Serve the trainable adapter as the policy's next version.

    The version before it stays, for requests on their way; older ones are retired unless an LM stays at them.
    """
    policy.retire_all_but({policy.version})
    return policy.publish()


def version_name(version: int) -> str:
    """A version as it is called in files and by servers."""
    return f"policy-{version:06d}"
