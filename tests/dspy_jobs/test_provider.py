import subprocess
import sys

from fst_optimizer.dspy_jobs.finetune import FinetuneJob
from fst_optimizer.dspy_jobs.reinforce import PolicyReinforceJob


def test_importing_the_package_loads_neither_torch_nor_dspy():
    code = (
        "import sys, fst_optimizer; print(sorted({'torch', 'dspy', 'transformers', 'peft', 'trl'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_lm_of_a_policy_has_the_provider_of_our_jobs(scripted):
    policy = scripted(lambda prompt, request: "")
    for lm in (policy.lm, policy.lm.copy(temperature=0.5), policy.lm_at(0)):
        assert (lm.provider.TrainingJob, lm.provider.ReinforceJob) == (FinetuneJob, PolicyReinforceJob)
        assert lm.provider.finetunable
        assert lm.provider.reinforceable
