"""Fast-Slow Training for DSPy programs: prompts and weights learned together.

`FST` is the optimizer, `Policy` the local model that it trains, `load` brings a finished run back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fst_optimizer.config.policy import LoraConfig, VLLMConfig
from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.run import BudgetConfig, EvalConfig, FastConfig, FSTConfig, TrainConfig
from fst_optimizer.errors import (
    EngineError,
    FSTError,
    MetricError,
    NotDistilled,
    Paused,
    ProgramError,
    ReflectionError,
    StopRun,
    StorageError,
    TrainingError,
    UserError,
)
from fst_optimizer.logs import show_warnings
from fst_optimizer.policy.provider import use_provider

if TYPE_CHECKING:
    from fst_optimizer.dspy_jobs.provider import PolicyProvider
    from fst_optimizer.engines.vllm.server import VLLMServer
    from fst_optimizer.finished.load import load
    from fst_optimizer.optimizer import FST
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.run.result import CompileResult
    from fst_optimizer.tuning.api import TuneResult, tune

__version__ = "0.1.0"
__all__ = [
    "FST",
    "BudgetConfig",
    "CompileResult",
    "EngineError",
    "EvalConfig",
    "FSTConfig",
    "FSTError",
    "FastConfig",
    "LoraConfig",
    "MetricError",
    "NotDistilled",
    "Paused",
    "Policy",
    "ProgramError",
    "ReflectionError",
    "RolloutConfig",
    "StopRun",
    "StorageError",
    "TrainConfig",
    "TrainingError",
    "TuneResult",
    "UserError",
    "VLLMConfig",
    "VLLMServer",
    "load",
    "tune",
]

show_warnings()


def _training_provider() -> PolicyProvider:
    """What lets dspy's own optimizers train a policy's LM; imported with the first LM, as it needs dspy."""
    from fst_optimizer.dspy_jobs.provider import PolicyProvider

    return PolicyProvider()


use_provider(_training_provider)

_LATE = {
    "FST": "optimizer",
    "CompileResult": "run.result",
    "Policy": "policy.policy",
    "VLLMServer": "engines.vllm.server",
    "load": "finished.load",
    "TuneResult": "tuning.api",
    "tune": "tuning.api",
}


def __getattr__(name: str) -> Any:
    """Import what needs dspy or torch when it is first asked for."""
    if name in _LATE:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
