"""Every setting there is."""

from fst_optimizer.config.monitors import MonitorsConfig
from fst_optimizer.config.policy import LoraConfig, PolicyConfig, VLLMConfig
from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.run import BudgetConfig, EvalConfig, FastConfig, FSTConfig, RunConfig, TrainConfig

SECTIONS = (
    *(FSTConfig, FastConfig, RolloutConfig, TrainConfig, EvalConfig, BudgetConfig, MonitorsConfig, RunConfig),
    *(LoraConfig, VLLMConfig, PolicyConfig),
)
SETTINGS = [(section, name) for section in SECTIONS for name in section.model_fields]


def full_name(section, name):
    return f"{section.section}.{name}".removeprefix(".")
