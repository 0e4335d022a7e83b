"""What a run spends, counted in one place and by kind; its caps; and what LMs that are not trained cost.

Caps on rollouts and steps are known before a phase starts: `schedule` looks at them. Tokens, seconds and dollars are
only known as rollouts end: the meter is asked before each one starts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import FSTError, UserError
from fst_optimizer.store.tally import FirstError, Tally, first_error, ordered
from fst_optimizer.types import Raised, Rollout, RolloutCounts, Usage, total_usage

if TYPE_CHECKING:
    from fst_optimizer.config.run import BudgetConfig
    from fst_optimizer.evolve.reflect import Reflector
    from fst_optimizer.run.state import State

OWN_SERVERS = ("hosted_vllm", "vllm", "ollama", "ollama_chat", "lm_studio", "llamafile")
"""Providers, as dspy and litellm name them, that run on the user's own machines: no dollars a token."""

MOST_CRASHES = 100
"""Places of which a run remembers that its program raised there."""

Prices = Mapping[str, tuple[float, float]]
"""Model -> dollars for a million prompt tokens, and for a million completion tokens; see `price_of` for names."""


def cost_usd(usage: Mapping[str, Usage], prices: Prices) -> float | None:
    """What all of this cost; None where a price is unknown."""
    costs = [model_cost_usd(model, used, prices) for model, used in usage.items()]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def model_cost_usd(model: str, used: Usage, prices: Prices) -> float | None:
    """What one model's tokens cost: by the price given, else 0 for an own server, else by litellm's table."""
    price = price_of(model, prices)
    if price is None and model.partition("/")[0] in OWN_SERVERS:
        return 0.0
    if price == (0, 0):
        return 0.0
    if used.untold or not (used.prompt_tokens or used.completion_tokens):
        return None  # the provider told no tokens, in earlier versions' runs by zeros
    if price is not None:
        return (used.prompt_tokens * price[0] + used.completion_tokens * price[1]) / 1e6
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


GIVE_PRICES = "give budget.prices, dollars per million prompt and completion tokens, or no cap"


def unknown_cost(usage: Mapping[str, Usage], prices: Prices) -> tuple[str, str] | None:
    """The models whose cost is unknown, and what to do; None where all are known."""
    unknown = {model: used for model, used in usage.items() if model_cost_usd(model, used, prices) is None}
    if not unknown:
        return None
    calls = [f"{used.untold} of {used.calls} calls of {model}" for model, used in unknown.items() if used.untold]
    remedy = GIVE_PRICES
    if calls:
        remedy = f"the provider told no tokens for {', '.join(calls)}. Use an LM that tells them, set no cap, or give "
        remedy += "budget.prices 0 and 0 for what costs nothing"
    return ", ".join(unknown), remedy


def price_of(model: str, prices: Prices) -> tuple[float, float] | None:
    """The price given for a model: by its whole name, or by the name without the provider on one of both sides."""
    if model in prices:
        return prices[model]
    bare = model.partition("/")[2]
    if bare in prices:
        return prices[bare]
    without = {name.partition("/")[2]: pair for name, pair in prices.items()}
    return without.get(model) if "/" not in model else None


def unknown_reflection(reflector: Reflector | None, prices: Prices) -> tuple[str, str]:
    """The same of the reflection LM."""
    model = reflector.model if reflector else ""
    remedy = "the provider told no tokens for a call. Use an LM that tells them, or set no cap"
    return f"the reflection LM {model}".strip(), GIVE_PRICES if price_of(model, prices) is None else remedy


class BudgetSpent(FSTError):
    """A cap was reached while rollouts ran; those in flight were finished."""

    def __init__(self, cap: str) -> None:
        super().__init__(f"budget.{cap} is reached")
        self.cap = cap
        """The setting's name in `budget`."""


class Meter:
    """Everything that a run has spent. Rollouts add to it as they end, from their own threads.

    Args:
        budget: The caps.
        reflector: Whose calls and dollars count too. None: nothing reflects.
    """

    def __init__(self, budget: BudgetConfig, reflector: Reflector | None = None) -> None:
        self.budget = budget
        self.reflector = reflector
        self.rollouts = RolloutCounts()
        self.tokens = 0
        """Sampled from the policy."""
        self.usage: dict[str, Usage] = {}
        self.outcomes: Counter[str] = Counter()
        self.first_error: FirstError | None = None
        self.crashes: set[str] = set()
        """What the program has raised, and where: what a run has had before is no new mistake in the program."""
        self._reflections_before = 0
        self._reflected_before_usd: float | None = 0.0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._kind = "eval"
        self._uncapped = False

    def resume(self, state: State, elapsed_s: float) -> None:
        """Go on from what earlier processes spent."""
        self.rollouts, self.tokens, self.usage = state.rollouts, state.tokens, dict(state.usage)
        self.outcomes, self.first_error = Counter(state.tally.outcomes), state.tally.first_error
        self.crashes = set(state.crashes)
        self._reflections_before, self._reflected_before_usd = state.reflection_calls, state.reflection_cost_usd
        if self.reflector:
            self.reflector.before = state.reflection_calls
        self._started = time.monotonic() - elapsed_s

    @contextmanager
    def charging(self, kind: str) -> Iterator[None]:
        """Rollouts that end meanwhile count as `fast`, `slow` or `eval`. Outside, they count as `eval`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def add(self, rollout: Rollout) -> bool:
        """A rollout ended; returns whether it is the first of the run that ended so."""
        with self._lock:
            self.rollouts = self.rollouts.plus(**{self._kind: 1})
            self.outcomes[str(rollout.outcome)] += 1
            self.tokens += rollout.tokens
            if rollout.usage:
                self.usage = total_usage(self.usage, rollout.usage)
            return self.outcomes[str(rollout.outcome)] == 1

    def add_usage(self, usage: Mapping[str, Usage]) -> None:
        """LMs besides the policy were asked this, by no rollout, or by one that was counted before."""
        if usage:
            with self._lock:
                self.usage = total_usage(self.usage, usage)

    def add_crash(self, raised: Raised) -> None:
        """The program raised this, and the run goes on all the same."""
        with self._lock:
            if len(self.crashes) < MOST_CRASHES:
                self.crashes.add(str(raised))

    def batch_ended(self, rollouts: Sequence[Rollout]) -> None:
        """These ended, in the order in which they were asked for: the first error must not depend on who was quick."""
        with self._lock:
            self.first_error = self.first_error or first_error(rollouts)

    def add_reused(self, count: int) -> None:
        """So many rollouts served a second purpose."""
        with self._lock:
            self.rollouts = self.rollouts.plus(reused=count)

    def spent(self) -> dict[str, Any]:
        """Everything so far, under the names that a run's `State` has for it."""
        with self._lock:
            return {
                "rollouts": self.rollouts,
                "tokens": self.tokens,
                "usage": self.usage,
                "tally": Tally(ordered(self.outcomes), self.first_error),
                "crashes": tuple(sorted(self.crashes)),
                "reflection_calls": self._reflections_before + (self.reflector.calls if self.reflector else 0),
                "reflection_cost_usd": self._reflection_cost_usd(),
            }

    def reached(self) -> str:
        """The name of a cap that is reached, "" while none is.

        Raises:
            UserError: dollars are capped, and a price is unknown.
        """
        budget = self.budget
        if self._uncapped:
            return ""
        if budget.max_tokens is not None and self.tokens >= budget.max_tokens:
            return "max_tokens"
        if budget.max_time_s is not None and time.monotonic() - self._started >= budget.max_time_s:
            return "max_time_s"
        if budget.max_cost_usd is not None and self._cost_usd() >= budget.max_cost_usd:
            return "max_cost_usd"
        return ""

    @contextmanager
    def uncapped(self) -> Iterator[None]:
        """No cap holds meanwhile: what is evaluated before and after all learning is always evaluated."""
        self._uncapped = True
        try:
            yield
        finally:
            self._uncapped = False

    def _reflection_cost_usd(self) -> float | None:
        before, now = self._reflected_before_usd, self.reflector.cost_usd if self.reflector else 0.0
        return None if before is None or now is None else before + now

    def _cost_usd(self) -> float:
        with self._lock:
            usage = dict(self.usage)
        rollouts, reflection = cost_usd(usage, self.budget.prices), self._reflection_cost_usd()
        if rollouts is None or reflection is None:
            prices = self.budget.prices
            who, remedy = unknown_cost(usage, prices) or unknown_reflection(self.reflector, prices)
            raise UserError(
                f"budget.max_cost_usd is {self.budget.max_cost_usd}, and what {who} costs is unknown: {remedy}"
            )
        return rollouts + reflection
