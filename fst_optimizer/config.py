"""Every setting, validated once. A setting arrives with its first user.

The names are DESIGN's words: `fast` is the prompt side, `slow` (here `train`) the weights, `rollout` what feeds
both. `FSTConfig.from_dict` takes the JSON of `config.json`, `with_values` the command line's `--set train.lr=1e-3`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fst_optimizer.errors import UserError, did_you_mean

METHODS = ("fst", "rl", "gepa", "sequential")
LOSS_NAMES = ("cispo", "grpo", "dr_grpo")


def _require(ok: bool, field_name: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{field_name} is {value!r}: {remedy}")


def _positive_int(name: str, value: object, minimum: int = 1) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        name,
        value,
        f"give a whole number of at least {minimum}",
    )


def _number(name: str, value: object, minimum: float, *, above: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (value > minimum if above else value >= minimum)  # type: ignore[operator]
    _require(ok, name, value, f"give a number {'above' if above else 'of at least'} {minimum}")


@dataclass(frozen=True)
class LoraConfig:
    """The shape of the trainable adapter."""

    rank: int = 16
    """r. vLLM serves 1, 8, 16, 32, 64, 128, 256, 320 and 512."""
    alpha: int = 32
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of adapter inputs dropped in training. Above 0, trainer and sampler disagree by design."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter. None: all but the output head."""

    def __post_init__(self) -> None:
        _positive_int("lora.rank", self.rank)
        _positive_int("lora.alpha", self.alpha)
        _number("lora.dropout", self.dropout, 0)
        _require(self.dropout < 1, "lora.dropout", self.dropout, "give a number below 1")


@dataclass(frozen=True)
class FastConfig:
    """The prompt side: one light GEPA round per cycle."""

    population: int = 4
    """K, the most candidates kept. `rollout.group_size` must be divisible by it."""
    anchor_size: int = 16
    """Examples that every candidate is scored on, drawn from those that the cycle's steps will use."""
    max_rollouts: int = 192
    """Metric calls that one round may spend, rescoring the old population included."""
    max_proposals: int = 12
    """Reflective mutations that one round may try."""
    patience: int = 4
    """Proposals in a row without an accepted one after which the round ends. 0: never."""
    minibatch: int = 4
    """Examples that one proposal reflects on, and is accepted or rejected on."""
    components: str = "round_robin"
    """Which predictors one proposal rewrites: `round_robin` or `all`."""
    temperature: float = 0.0
    """Sampling temperature of the fast round's rollouts. 0 is greedy: less noise on the frontier."""
    reflection_calls: int | None = None
    """Most reflection-LM calls in the whole run. None: no limit."""

    def __post_init__(self) -> None:
        for name in ("population", "anchor_size", "max_rollouts", "minibatch"):
            _positive_int(f"fast.{name}", getattr(self, name))
        _positive_int("fast.max_proposals", self.max_proposals, 0)
        _positive_int("fast.patience", self.patience, 0)
        _number("fast.temperature", self.temperature, 0)
        _require(
            self.components in ("round_robin", "all"),
            "fast.components",
            self.components,
            did_you_mean(str(self.components), ("round_robin", "all")),
        )
        if self.reflection_calls is not None:
            _positive_int("fast.reflection_calls", self.reflection_calls, 0)


@dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are sampled, and what the failed ones earn."""

    group_size: int = 8
    """G, rollouts per example and step, over all candidates."""
    batch_size: int = 8
    """Examples per step."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts, where the program does not ask for another."""
    timeout_s: float = 120.0
    """Wall-clock limit of one rollout, in seconds."""
    num_threads: int = 64
    """Rollouts in flight."""
    parse_error_reward: float = 0.0
    """Reward of a rollout whose answer could not be parsed."""
    truncated_reward: float = 0.0
    """Reward of a rollout that failed because a completion ran into max_tokens."""
    prompt_too_long_reward: float = 0.0
    """Reward of a rollout whose prompt left no room in the context."""
    program_error_reward: float = 0.0
    """Reward of a rollout in which the program or a tool raised."""
    timeout_reward: float = 0.0
    """Reward of a rollout that was cut off after `timeout_s`."""

    def __post_init__(self) -> None:
        _positive_int("rollout.group_size", self.group_size, 2)
        for name in ("batch_size", "num_threads"):
            _positive_int(f"rollout.{name}", getattr(self, name))
        _number("rollout.temperature", self.temperature, 0, above=True)
        _number("rollout.timeout_s", self.timeout_s, 0, above=True)
        for name in ("parse_error", "truncated", "prompt_too_long", "program_error", "timeout"):
            _number(f"rollout.{name}_reward", getattr(self, f"{name}_reward"), -math.inf, above=True)


@dataclass(frozen=True)
class TrainConfig:
    """The weight side: T steps of policy gradient on one LoRA adapter."""

    steps_per_cycle: int = 6
    """T, slow steps after each fast round."""
    lr: float = 1e-3
    """Peak learning rate of AdamW on the LoRA matrices."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradient norm above which the gradient is scaled down. None: no clipping."""
    loss: str = "cispo"
    """`cispo`, `grpo` or `dr_grpo`."""
    ratio_cap: float = 4.0
    """CISPO's tau: the largest importance weight, an absolute number."""
    clip_low: float = 0.2
    """grpo and dr_grpo: the ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """grpo and dr_grpo: the ratio is clipped above 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL-to-base penalty. 0 skips its forward pass."""
    average: str = "token"
    """`token`: every token of the batch counts the same; `rollout`: every rollout does."""
    advantage_eps: float = 1e-4
    """Added to a group's standard deviation."""
    train_truncated: bool = True
    """Whether calls that ran into max_tokens are trained on. False masks them."""
    microbatch_tokens: int = 8192
    """Most padded tokens in one forward pass."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""
    max_bad_steps: int = 3
    """Non-finite losses or gradients in a row after which the run stops."""

    def __post_init__(self) -> None:
        for name in ("steps_per_cycle", "microbatch_tokens", "max_bad_steps"):
            _positive_int(f"train.{name}", getattr(self, name))
        _positive_int("train.warmup_steps", self.warmup_steps, 0)
        _number("train.lr", self.lr, 0, above=True)
        for name in ("weight_decay", "kl_coef", "clip_low", "clip_high"):
            _number(f"train.{name}", getattr(self, name), 0)
        for name in ("ratio_cap", "advantage_eps"):
            _number(f"train.{name}", getattr(self, name), 0, above=True)
        if self.max_grad_norm is not None:
            _number("train.max_grad_norm", self.max_grad_norm, 0, above=True)
        if isinstance(self.betas, list):  # as JSON has it
            object.__setattr__(self, "betas", tuple(self.betas))
        betas_ok = isinstance(self.betas, tuple) and len(self.betas) == 2
        betas_ok = betas_ok and all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas)
        _require(betas_ok, "train.betas", self.betas, "give two numbers in [0, 1)")
        _require(self.loss in LOSS_NAMES, "train.loss", self.loss, did_you_mean(str(self.loss), LOSS_NAMES))
        _require(
            self.average in ("token", "rollout"),
            "train.average",
            self.average,
            did_you_mean(str(self.average), ("token", "rollout")),
        )


@dataclass(frozen=True)
class EvalConfig:
    """How (candidate, policy version) pairs are compared on the validation set."""

    candidates: int = 1
    """Candidates validated after each cycle, best anchor means first."""
    max_examples: int | None = None
    """Validation examples used, the first ones. None: all."""
    temperature: float = 0.0
    """0: greedy decoding, as every score in the docs."""
    kl_examples: int = 32
    """Held-out examples on whose sampled tokens `kl_to_base` is measured."""

    def __post_init__(self) -> None:
        _positive_int("eval.candidates", self.candidates)
        _positive_int("eval.kl_examples", self.kl_examples)
        _number("eval.temperature", self.temperature, 0)
        if self.max_examples is not None:
            _positive_int("eval.max_examples", self.max_examples)


@dataclass(frozen=True)
class BudgetConfig:
    """When to stop."""

    max_cycles: int = 10
    """Cycles of a run."""
    max_rollouts: int | None = None
    """Cap on fast + slow rollouts together; checked before spending. None: no cap."""

    def __post_init__(self) -> None:
        _positive_int("budget.max_cycles", self.max_cycles)
        if self.max_rollouts is not None:
            _positive_int("budget.max_rollouts", self.max_rollouts)


@dataclass(frozen=True)
class FSTConfig:
    """Everything that decides a run, but for the program, the data, the metric and the policy."""

    method: str = "fst"
    """`fst`; `rl` (K = 1, seed instruction, no fast rounds); `gepa` (fast rounds only); `sequential` (half of the
    rollouts on GEPA, then the rest on RL with its best candidate)."""
    seed: int = 0
    """Every random choice follows from it."""
    fast: FastConfig = field(default_factory=FastConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, did_you_mean(str(self.method), METHODS))
        _positive_int("seed", self.seed, 0)
        group, population = self.rollout.group_size, self.fast.population
        if self.method == "fst":
            _require(
                group % population == 0,
                "rollout.group_size",
                group,
                f"it must be divisible by fast.population ({population}), so that every candidate gets G/K rollouts",
            )
        if self.method == "sequential":
            _require(
                self.budget.max_rollouts is not None,
                "budget.max_rollouts",
                None,
                "the sequential method spends half of it on GEPA, so give a number",
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base: FSTConfig | None = None) -> FSTConfig:
        """Nested settings over `base` (or the defaults). An unknown key raises UserError with the nearest name."""
        merged: FSTConfig = _merge(base or cls(), data, "")
        return merged

    def with_values(self, values: Mapping[str, Any]) -> FSTConfig:
        """Dotted settings over this config, e.g. `{"train.lr": 1e-3}`."""
        nested: dict[str, Any] = {}
        for dotted, value in values.items():
            *sections, name = dotted.split(".")
            target = nested
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
        return FSTConfig.from_dict(nested, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written in `config.json`."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


def _merge(config: Any, data: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"config is {data!r}: give an FSTConfig or an object of settings")
    known = {f.name for f in dataclasses.fields(config)}
    changes: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise UserError(f"config: unknown key {prefix + name!r}; {did_you_mean(name, known)}")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"config: {prefix + name} is {value!r}: give an object of settings")
            value = _merge(current, value, f"{prefix}{name}.")
        changes[name] = value
    return dataclasses.replace(config, **changes)


_PRESETS: dict[str, dict[str, Any]] = {
    "light": {"budget": {"max_cycles": 4}},
    "medium": {"budget": {"max_cycles": 12}},
    "heavy": {"budget": {"max_cycles": 40}, "fast": {"max_rollouts": 384, "anchor_size": 32, "max_proposals": 24}},
}


def preset(name: str) -> FSTConfig:
    """The settings behind `auto="light"`, `"medium"` and `"heavy"`."""
    if name not in _PRESETS:
        raise UserError(f"auto is {name!r}: {did_you_mean(str(name), _PRESETS)}")
    return FSTConfig.from_dict(_PRESETS[name])
