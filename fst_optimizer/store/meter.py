"""What a run spends: tokens, seconds and dollars, against its caps; and what LMs that are not trained cost.

Caps on rollouts and steps are known before a phase and are checked in `cycle`. The others are only known as rollouts
end: the meter is asked before each one starts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fst_optimizer.config.run import BudgetConfig
from fst_optimizer.errors import FSTError, UserError
from fst_optimizer.types import Rollout, Usage, total_usage

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


class BudgetSpent(FSTError):
    """A cap was reached while rollouts ran; those in flight were finished."""

    def __init__(self, cap: str) -> None:
        super().__init__(f"budget.{cap} is reached")
        self.cap = cap
        """The setting's name in `budget`."""


class Meter:
    """Tokens, seconds and dollars of a run so far. Rollouts add to it as they end, from their own threads.

    Args:
        budget: The caps.
        reflection_cost_usd: What this process has paid for reflection so far; None once a price is unknown.
    """

    def __init__(self, budget: BudgetConfig, reflection_cost_usd: Callable[[], float | None] = lambda: 0.0) -> None:
        self.budget = budget
        self.rollouts = 0
        """Executed by this process."""
        self.tokens = 0
        self.usage: dict[str, Usage] = {}
        self._reflection_cost_usd = reflection_cost_usd
        self._reflected_before_usd: float | None = 0.0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._free = False

    def resume(
        self, *, tokens: int, usage: Mapping[str, Usage], reflection_cost_usd: float | None, elapsed_s: float
    ) -> None:
        """Go on from what earlier processes spent."""
        self.tokens, self.usage = tokens, dict(usage)
        self._reflected_before_usd = reflection_cost_usd
        self._started = time.monotonic() - elapsed_s

    def add(self, rollout: Rollout) -> None:
        """A rollout ended."""
        with self._lock:
            self.rollouts += 1
            self.tokens += rollout.tokens
            if rollout.usage:
                self.usage = total_usage(self.usage, rollout.usage)

    def spent(self) -> dict[str, Any]:
        """`tokens` and `usage` so far, as a run's state has them."""
        with self._lock:
            return {"tokens": self.tokens, "usage": self.usage}

    def reached(self) -> str:
        """The name of a cap that is reached, "" while none is.

        Raises:
            UserError: dollars are capped, and a price is unknown.
        """
        budget = self.budget
        if self._free:
            return ""
        if budget.max_tokens is not None and self.tokens >= budget.max_tokens:
            return "max_tokens"
        if budget.max_time_s is not None and time.monotonic() - self._started >= budget.max_time_s:
            return "max_time_s"
        if budget.max_cost_usd is not None and self._cost_usd() >= budget.max_cost_usd:
            return "max_cost_usd"
        return ""

    @contextmanager
    def free(self) -> Iterator[None]:
        """No cap holds meanwhile: what is evaluated before and after all learning is always evaluated."""
        self._free = True
        try:
            yield
        finally:
            self._free = False

    def _cost_usd(self) -> float:
        with self._lock:
            usage = dict(self.usage)
        parts = (cost_usd(usage, self.budget.prices), self._reflected_before_usd, self._reflection_cost_usd())
        if None in parts:
            unknown = [
                model for model, used in usage.items() if model_cost_usd(model, used, self.budget.prices) is None
            ]
            raise UserError(
                f"budget.max_cost_usd is {self.budget.max_cost_usd}, and what {', '.join(unknown) or 'reflection'} "
                "costs is unknown: give budget.prices, dollars per million prompt and completion tokens, or no cap"
            )
        return sum(part for part in parts if part is not None)
