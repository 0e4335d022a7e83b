"""What a call of a policy's LM may ask for, besides its prompt: all that is not refused here is honoured exactly.

Training needs the log-probability that each token was sampled with. Sampler and trainer agree on it for the model's own
distribution at a temperature; whatever else cuts or bends the distribution would make the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dspy.lm15 import Request

HONOURED = ("temperature", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "rollout_id")
NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}
"""What shapes the distribution -> the values that change nothing."""
TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
THINKING = ("reasoning", "reasoning_effort", "thinking")
TEXT_ALONE = ("logprobs", "top_logprobs", "response_format", "stream", "prediction")


def check_options(options: Mapping[str, Any], where: str = "") -> None:
    """Refuse what a policy's LM cannot do as asked; None and False say nothing.

    Raises:
        UserError: names the option, its value and the remedy.
    """
    for name, value in options.items():
        if value is None or value is False:
            continue
        remedy = _remedy(name, value)
        if remedy is not None:
            raise UserError(f"{where}{name} is {value!r}: {remedy}")
    if (options.get("n") or 1) > 1 and options.get("seed") is not None:
        raise UserError(
            f"{where}seed is {options['seed']!r} and n is {options['n']!r}: every completion would be the same; leave "
            "one of them out"
        )


def options_of(request: Request) -> dict[str, Any]:
    """What a request asks for, by the names that `check_options` knows."""
    config = request.config
    asked = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "extensions"}
    given = {name: value for name, value in asked.items() if value not in (None, ())}
    if given.get("logprobs") == 0:
        given["logprobs"] = True  # 0 asks for the chosen tokens' own
    return {**given, **(config.extensions or {}), **({"tools": request.tools} if request.tools else {})}


def _remedy(name: str, value: object) -> str | None:
    """What to do instead; None where nothing is wrong."""
    if name in NEUTRAL:
        if any(value == neutral for neutral in NEUTRAL[name]):
            return None
        return (
            "a policy samples from the model's own distribution, as training needs the log-probs of just that; "
            "leave it out, or set temperature"
        )
    if name in TOOLS:
        return "a policy is given no tool definitions; leave it out, and let dspy write them into the prompt"
    if name in THINKING:
        return "a policy thinks as its chat template says; give Policy(chat_template_args={'enable_thinking': ...})"
    if name in TEXT_ALONE:
        return "a policy samples freely and gives back text alone; leave it out"
    if name == "cache":
        return "dspy's cache knows nothing of weights, and would answer by those of an older version; leave it out"
    if name not in HONOURED:
        return f"a policy's LM has no such option; {did_you_mean(name, HONOURED)}"
    return None if _fits(name, value) else _RANGES[name]


_RANGES = {
    "temperature": "give a number from 0 to 2; 0 is greedy",
    "max_tokens": "give a whole number of at least 1",
    "max_completion_tokens": "give a whole number of at least 1",
    "stop": "give a string, or a list of strings, none of them empty",
    "seed": "give a whole number of at least 0",
    "n": "give a whole number of at least 1",
}


def _fits(name: str, value: Any) -> bool:
    if name == "rollout_id":  # dspy's own, for its cache
        return True
    if name == "stop":
        words = [value] if isinstance(value, str) else value
        return isinstance(words, list | tuple) and all(isinstance(word, str) and word for word in words)
    if isinstance(value, bool):
        return False
    if name == "temperature":
        return isinstance(value, Real) and 0 <= float(value) <= 2
    return isinstance(value, Integral) and int(value) >= (0 if name == "seed" else 1)
