"""The policy's trainable adapter, as a training job uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.policy import Policy


def tensors_at(policy: Policy, version: int) -> dict[str, Tensor]:
    """The LoRA tensors of a served version; the base's add nothing. Raises UserError where it was retired."""
    policy.check_served(version, "the LM")
    return policy.tensors(version) if version else policy.zero_adapter


def load(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into the trainable adapter; what is served does not change."""
    from fst_optimizer.model import lora

    with policy.lock:
        lora.restore(policy.model, tensors)


def publish_next(policy: Policy) -> int:
    """Serve the trainable adapter as the policy's next version.

    The version before it stays, for requests in flight; older ones are retired unless an LM stays at them.
    """
    policy.retire_all_but({policy.version})
    return policy.publish()
