"""What a run costs in dollars: the tokens of LMs that are not trained, at their prices."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fst_optimizer.types import Usage

OWN_SERVERS = ("hosted_vllm", "vllm", "ollama", "ollama_chat", "lm_studio", "llamafile")
"""Providers, as dspy and litellm name them, that run on the user's own machines: no dollars a token."""

Prices = Mapping[str, tuple[float, float]]
"""Model -> dollars for a million prompt tokens, and for a million completion tokens."""


def cost_usd(usage: Mapping[str, Usage], prices: Prices) -> float | None:
    """What all of this cost; None where a price is unknown."""
    costs = [model_cost_usd(model, used, prices) for model, used in usage.items()]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def model_cost_usd(model: str, used: Usage, prices: Prices) -> float | None:
    """What one model's tokens cost: by the price given, else 0 for an own server, else by litellm's table."""
    if model in prices:
        prompt, completion = prices[model]
        return (used.prompt_tokens * prompt + used.completion_tokens * completion) / 1e6
    if model.partition("/")[0] in OWN_SERVERS:
        return 0.0
    if not used.prompt_tokens and not used.completion_tokens:
        return None  # the provider told no tokens
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network for prices
    import litellm

    litellm.suppress_debug_info = True  # else an unknown model prints a page of advice
    try:
        costs = litellm.cost_per_token(
            model=model,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cache_read_input_tokens=used.cached_tokens,
        )
    except Exception:  # litellm raises a bare Exception for a model that its table lacks
        return None
    return float(sum(costs))
