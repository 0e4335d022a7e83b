"""What makes dspy take a policy's LM for one that can be trained."""

from __future__ import annotations

from typing import Any

from dspy.clients.provider import Provider

from fst_optimizer.dspy_jobs.finetune import FinetuneJob
from fst_optimizer.dspy_jobs.reinforce import PolicyReinforceJob


class PolicyProvider(Provider):  # type: ignore[misc]
    """The provider of every `PolicyLM`. It holds nothing: jobs find the policy through the LM.

    `PolicyLM.finetune` makes its job itself, since dspy's own way tells `Provider.finetune` a model's name alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = True
        self.reinforceable = True
        self.TrainingJob = FinetuneJob
        self.ReinforceJob = PolicyReinforceJob

    @staticmethod
    def launch(lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing: the policy's engine runs for as long as the policy is open."""

    @staticmethod
    def kill(lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing: `policy.close()` stops the engine. Optimizers kill LMs that programs still use."""
