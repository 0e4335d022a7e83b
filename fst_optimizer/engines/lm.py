"""`policy.lm`: a `dspy.LM` whose engine is the policy, and the way back from an LM to its policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dspy

from fst_optimizer.engines.recorder import AsyncRecordingEngine, RecordingEngine

if TYPE_CHECKING:
    from fst_optimizer.policy import Policy


class PolicyLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` that leaves no trace of itself in a saved program.

    dspy refuses to load custom engines from a file, and weights do not belong in a program's JSON: the program is
    saved as if it had no LM, and the LM is attached again by `set_lm`, `dspy.configure` or `fst_optimizer.load`.
    """

    def dump_state(self) -> dict[str, Any]:
        """Empty, which dspy reads as "no LM of its own"."""
        return {}


def make_lm(policy: Policy, version: int | None, *, trainable: bool) -> PolicyLM:
    """An LM on `policy`, at its current version or at a fixed one."""
    engine = RecordingEngine(policy, version, trainable=trainable)
    return PolicyLM(
        f"hosted_vllm/{policy.name}",
        engine=engine,
        async_engine=AsyncRecordingEngine(engine),
        cache=False,  # dspy's cache knows nothing of weights
        num_retries=0,
    )


def trainable_policy(lm: object) -> Policy | None:
    """The policy that an LM trains, or None for an API model or a frozen use of a policy."""
    engine = getattr(lm, "engine", None)
    return engine.policy if isinstance(engine, RecordingEngine) and engine.trainable else None
