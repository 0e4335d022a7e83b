"""The settings behind `auto`: a name for each length of run, and the paper's."""

from __future__ import annotations

from typing import Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError, did_you_mean

_PRESETS: dict[str, dict[str, Any]] = {
    "light": {"budget": {"max_cycles": 4}},
    "medium": {"budget": {"max_cycles": 12}},
    "heavy": {"budget": {"max_cycles": 40}, "fast": {"max_rollouts": 384, "anchor_size": 32, "max_proposals": 24}},
    "paper": {
        # 960 calls end a round, neither patience nor proposals do: each of those costs a minibatch, 4 calls.
        "fast": {"population": 4, "anchor_size": 192, "max_rollouts": 960, "max_proposals": 240, "patience": 0},
        "rollout": {"group_size": 8, "batch_size": 32, "temperature": 1.0},
        "train": {
            "steps_per_cycle": 6,
            "warmup_steps": 10,
            "betas": (0.9, 0.999),
            "weight_decay": 0.0,
            "max_grad_norm": None,
            "loss": "cispo",
            "ratio_cap": 4.0,
            "kl_coef": 0.001,
            "average": "prompt",
        },
        "budget": {"max_cycles": 34},  # 204 steps: the paper trains 200 on each task of its sequence
    },
}


def preset(name: str) -> FSTConfig:
    """The settings behind `auto="light"`, `"medium"`, `"heavy"` and `"paper"`.

    `paper`: what arXiv 2605.12484 gives. Ours are the learning rate, which it does not publish, and the cycles.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise UserError(f"auto is {name!r}: {did_you_mean(str(name), _PRESETS)}")
    return FSTConfig.from_dict(_PRESETS[name])
