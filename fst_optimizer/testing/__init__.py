"""For tests of programs, engines and FST itself: a tiny model, an engine with scripted completions, a contract.

    policy = Policy(make_tiny_model(folder), engine=lambda policy: ScriptedEngine(policy, answer))

runs all of FST without a trained model: `answer` writes the completions, everything else is what a real run uses.
"""

from fst_optimizer.testing.contracts import EngineContract, as_row
from fst_optimizer.testing.scripted import Answer, ScriptedEngine, chat_answer
from fst_optimizer.testing.tiny import make_tiny_model, move_adapter

__all__ = [
    "Answer",
    "EngineContract",
    "ScriptedEngine",
    "as_row",
    "chat_answer",
    "make_tiny_model",
    "move_adapter",
]
