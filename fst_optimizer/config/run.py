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
ENGINES = ("torch", "vllm")
LOSS_NAMES = ("cispo", "grpo", "dr_grpo")
ROLES = ("both", "evolve", "train", "neither")
CREDITS = ("rollout", "predictor")
MONITOR_ACTIONS = ("off", "warn", "pause")
OPEN = ("predictors", "budget.prices")
"""Settings that are objects with names of the user's own, which may have dots in them."""


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
class VLLMConfig:
    """How a vLLM server is started, placed and spoken to. Nothing here changes what is sampled."""

    gpu_memory_utilization: float | None = None
    """Share of each GPU's memory that vLLM takes. None: 0.45 beside the trainer, 0.9 on GPUs of its own."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the server, e.g. "1" or "1,2". None: the same GPUs as the trainer."""
    max_live_versions: int = 4
    """Policy versions besides the base that are served at once; each takes an adapter's memory in vLLM."""
    max_in_flight: int = 256
    """Requests that the server is given at once; the others wait here."""
    max_model_len: int | None = None
    """Most tokens of prompt and completion together. None: the model's own."""
    cpu_kv_cache_gib: int = 1
    """Memory for the KV cache where vLLM runs on CPU, in GiB."""
    cpu_threads: str = "auto"
    """VLLM_CPU_OMP_THREADS_BIND: "auto" leaves a core to the server's front and to the programs; "0-3" names cores."""
    start_timeout_s: float = 900.0
    """How long a start may take, in seconds; large models are read from disk in it."""
    request_timeout_s: float = 600.0
    """After how many seconds without an answer a request counts as lost to overload."""
    adapter_dir: str | None = None
    """Where adapters are written for the server to read. None: a temporary folder; a server on another machine needs a
    folder that both see under one path."""
    log_file: str | None = None
    """Where a server that is started here writes its log. None: a temporary folder."""
    flags: tuple[str, ...] = ()
    """More flags for `vllm serve`, e.g. ("--enforce-eager", "--tensor-parallel-size=2"). They win over the others."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        if share is not None:
            _number("vllm.gpu_memory_utilization", share, 0, above=True)
            _require(share <= 1, "vllm.gpu_memory_utilization", share, "give a share of at most 1")
        _positive_int("vllm.max_live_versions", self.max_live_versions, 3)
        _positive_int("vllm.max_in_flight", self.max_in_flight)
        if self.max_model_len is not None:
            _positive_int("vllm.max_model_len", self.max_model_len)
        _positive_int("vllm.cpu_kv_cache_gib", self.cpu_kv_cache_gib)
        for name in ("start_timeout_s", "request_timeout_s"):
            _number(f"vllm.{name}", getattr(self, name), 0, above=True)
        flags = self.flags
        _require(
            not isinstance(flags, str) and all(isinstance(flag, str) for flag in flags),
            "vllm.flags",
            flags,
            'give a list of strings, e.g. ["--enforce-eager"]',
        )
        object.__setattr__(self, "flags", tuple(flags))
        secret = [flag for flag in flags if flag.startswith("--api-key")]
        _require(not secret, "vllm.flags", "--api-key=...", "give api_key instead, which is kept out of all files")


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
    teacher_rollouts: int = 1
    """Rollouts that each teacher program adds to every group."""
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
        for name in ("batch_size", "num_threads", "teacher_rollouts"):
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
    credit: str = "rollout"
    """`rollout`: every call of a rollout gets the rollout's advantage. `predictor`: each predictor's calls get one of
    their own, from a blend of the predictor's score, which the metric gives when it is called with `pred_name`, and
    the program's."""
    own_share: float = 0.5
    """With `credit="predictor"`: how much of the blend is the predictor's own score, from 0 to 1."""
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
        _require(self.credit in CREDITS, "train.credit", self.credit, did_you_mean(str(self.credit), CREDITS))
        _number("train.own_share", self.own_share, 0)
        _require(self.own_share <= 1, "train.own_share", self.own_share, "give a share from 0 to 1")
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
    max_steps: int | None = None
    """Cap on slow steps. None: no cap."""
    patience: int | None = None
    """Cycles in a row without a better validation score after which the run stops. None: it never does for that."""
    max_time_s: float | None = None
    """Seconds that the run may take, over all resumes. None: no cap. This one and the next two are looked at before
    every rollout: at the cap those in flight are finished, and the best pair so far is returned."""
    max_tokens: int | None = None
    """Cap on tokens that the policy samples, evaluations included. None: no cap."""
    max_cost_usd: float | None = None
    """Dollars that reflection and other LMs in rollouts may cost. None: no cap, and prices may be unknown."""
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Model -> dollars for a million prompt tokens, and for a million completion tokens. Models not named: as litellm's
    price table has them."""

    def __post_init__(self) -> None:
        _positive_int("budget.max_cycles", self.max_cycles)
        if self.max_rollouts is not None:
            _positive_int("budget.max_rollouts", self.max_rollouts)
        for name in ("max_steps", "max_tokens", "patience"):
            if getattr(self, name) is not None:
                _positive_int(f"budget.{name}", getattr(self, name))
        for name in ("max_time_s", "max_cost_usd"):
            if getattr(self, name) is not None:
                _number(f"budget.{name}", getattr(self, name), 0, above=True)
        _require(isinstance(self.prices, Mapping), "budget.prices", self.prices, "give an object of models and prices")
        for model, pair in self.prices.items():
            name = f"budget.prices.{model}"
            ok = isinstance(pair, list | tuple) and len(pair) == 2
            _require(ok, name, pair, "give two numbers, dollars per million prompt and completion tokens")
            for price in pair:
                _number(name, price, 0)
        object.__setattr__(self, "prices", {model: tuple(pair) for model, pair in self.prices.items()})


@dataclass(frozen=True)
class MonitorsConfig:
    """What is watched while a run goes on. `warn` says so once; `pause` also ends the process, with a checkpoint."""

    kl: str = "warn"
    """The policy is far from its base."""
    kl_max: float = 1.0
    """Nats a token beyond which it is."""
    entropy: str = "warn"
    """The policy says one thing only, and is not right in it."""
    entropy_min: float = 0.01
    """Nats a token below which it does."""
    entropy_unless_reward: float = 0.9
    """Mean reward from which on little entropy is no fault."""
    format: str = "warn"
    """Many rollouts cannot be parsed, or are cut."""
    format_max: float = 0.5
    """Share of a step's rollouts beyond which they are many."""
    steps: int = 3
    """Steps in a row that `entropy` and `format` must see it."""
    flat: str = "warn"
    """Every group has one reward only, so that nothing is learned."""
    flat_batches: int = 5
    """Batches in a row that `flat` must see it."""
    falling: str = "warn"
    """The validation score falls while the training reward rises."""
    falling_evals: int = 3
    """Evaluations in a row that `falling` must see it."""

    def __post_init__(self) -> None:
        for name in ("kl", "entropy", "format", "flat", "falling"):
            action = getattr(self, name)
            _require(action in MONITOR_ACTIONS, f"monitors.{name}", action, did_you_mean(str(action), MONITOR_ACTIONS))
        for name in ("kl_max", "entropy_min", "entropy_unless_reward", "format_max"):
            _number(f"monitors.{name}", getattr(self, name), 0)
        for name in ("steps", "flat_batches", "falling_evals"):
            _positive_int(f"monitors.{name}", getattr(self, name))


@dataclass(frozen=True)
class RunConfig:
    """How a run keeps what it has. Nothing here changes what is learned."""

    keep_checkpoints: int = 2
    """Checkpoints that stay on disk, the last included, and up to four more until as many different weights are among
    them; the best pair's adapter always does."""
    grace_s: float = 10.0
    """How long rollouts in flight may go on after Ctrl-C or SIGTERM, in seconds. A second Ctrl-C drops them."""

    def __post_init__(self) -> None:
        _positive_int("run.keep_checkpoints", self.keep_checkpoints)
        _number("run.grace_s", self.grace_s, 0)


def _check_roles(predictors: object) -> None:
    ok = isinstance(predictors, Mapping)
    _require(ok, "predictors", predictors, 'give an object of names and roles, e.g. {"answer": "train"}')
    assert isinstance(predictors, Mapping)
    for name, role in predictors.items():
        _require(role in ROLES, f"predictors.{name}", role, did_you_mean(str(role), ROLES))


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
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    predictors: Mapping[str, str] = field(default_factory=dict)
    """Predictor name -> what may change: `both` its instruction and the weights by its calls, `evolve` the
    instruction alone, `train` the weights alone, `neither`. Those not named: `both`."""

    def __post_init__(self) -> None:
        _check_roles(self.predictors)
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

    def trains(self, predictor: str) -> bool:
        """Whether this predictor's calls change the weights."""
        return self.predictors.get(predictor, "both") in ("both", "train")

    def evolves(self, predictor: str) -> bool:
        """Whether this predictor's instruction changes."""
        return self.predictors.get(predictor, "both") in ("both", "evolve")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base: FSTConfig | None = None) -> FSTConfig:
        """Nested settings over `base` (or the defaults). An unknown key raises UserError with the nearest name."""
        merged: FSTConfig = _merge(base or cls(), data, "")
        return merged

    def with_values(self, values: Mapping[str, Any]) -> FSTConfig:
        """Dotted settings over this config, e.g. `{"train.lr": 1e-3}`."""
        nested: dict[str, Any] = {}
        for dotted, value in values.items():
            *sections, name = split_name(dotted)
            target = nested
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
        return FSTConfig.from_dict(nested, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written in `config.json`."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


def split_name(dotted: str) -> list[str]:
    """The parts of a setting's name: `train.lr` has two, `budget.prices.openai/gpt-5.2` three."""
    for name in OPEN:
        if dotted.startswith(f"{name}."):
            return [*name.split("."), dotted.removeprefix(f"{name}.")]
    return dotted.split(".")


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
        elif prefix + name in OPEN and isinstance(value, Mapping):
            value = {**current, **value}
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
