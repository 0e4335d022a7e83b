"""What makes dspy take a policy's LM for one that can be trained."""

from __future__ import annotations

from dspy.clients.provider import Provider

from fst_optimizer.dspy_jobs.finetune import FinetuneJob
from fst_optimizer.dspy_jobs.reinforce import PolicyReinforceJob


class PolicyProvider(Provider):  # type: ignore[misc]
    """The provider of every `PolicyLM`. It holds nothing: jobs find the policy through the LM.

    `launch` and `kill` do nothing, as in dspy's class: the policy's engine runs until `policy.close()`, and optimizers
    kill LMs that programs still use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = self.reinforceable = True
        self.TrainingJob, self.ReinforceJob = FinetuneJob, PolicyReinforceJob
