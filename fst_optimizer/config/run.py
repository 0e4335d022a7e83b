"""Every setting of a run, validated once.

The section `fast` is for the prompts, `train` for the weights (the slow side), `rollout` for what feeds both.
`FSTConfig.from_dict` takes the JSON of `config.json`, `with_values` the command line's `--set train.lr=1e-3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from fst_optimizer.config.distill import DistillConfig
from fst_optimizer.config.monitors import MonitorsConfig
from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.section import Remedy, Section, has_names, merged
from fst_optimizer.errors import UserError

Method = Literal["fst", "rl", "gepa", "sequential", "once"]
METHODS: tuple[Method, ...] = get_args(Method)
Role = Literal["both", "evolve", "train", "neither"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False), Remedy("give two numbers in [0, 1)")]
Price = Annotated[float, Field(ge=0)]
PricePair = Annotated[
    tuple[Price, Price],
    Field(strict=False),
    Remedy("give two numbers of at least 0, dollars per million prompt and completion tokens"),
]
OPEN = ("predictors", "budget.prices")
"""Settings that are objects with names of the user's own, which may have dots in them."""


class FastConfig(Section, section="fast"):
    """The prompt side: one light GEPA round per cycle."""

    population: int = Field(default=4, ge=1)
    """K, the most candidates kept. With the method fst, `rollout.group_size` must be divisible by it."""
    anchor_size: int = Field(default=16, ge=1)
    """Examples that every candidate is scored on, drawn from those that the cycle's steps will use; all of those where
    they are fewer."""
    max_rollouts: int = Field(default=192, ge=1)
    """Metric calls that one round may spend, rescoring the old population included."""
    max_proposals: int = Field(default=12, ge=0)
    """Reflective mutations that one round may try."""
    patience: int = Field(default=4, ge=0)
    """Proposals in a row without an accepted one after which the round ends. 0: never."""
    minibatch: int = Field(default=4, ge=1)
    """Examples that one proposal reflects on, and is accepted or rejected on."""
    parallel_proposals: int = Field(default=1, ge=1)
    """Proposals in flight, each from a parent of its own draw: their reflections are asked for side by side, their
    minibatches run as one batch. Raise it, to 4 or 8, where the reflection LM takes seconds to answer. The more, the
    fewer of them are made from what the others found, and a cap on time or dollars is passed by as many calls."""
    accept: Literal["sum", "paired"] = "sum"
    """How a proposal is compared with its parent. `sum`: its sum of scores over the minibatch is higher. `paired`: more
    examples of the anchor are drawn until a paired test has decided, or all are used and their sum decides. Take
    `paired` where scores are noisy or proposals that were written for four examples fail on others: it rejects on more
    rollouts, and accepts less of what is no better."""
    merge: bool = False
    """Whether two candidates of the frontier are merged, text by text, before a round's first proposal and after each
    that is accepted. A merge counts as a proposal, without a reflection. Try it in programs of several predictors; with
    one there is nothing to merge."""
    max_instruction_tokens: int | None = Field(default=None, ge=1)
    """Tokens, as the policy counts them, beyond which a proposed text is rejected before any rollout; the reflection LM
    is told. Set it where long prompts cost too much. None: no limit."""
    components: Literal["round_robin", "all"] = "round_robin"
    """Which predictors one proposal rewrites: `round_robin` or `all`."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the fast round's rollouts. 0 is greedy: less noise on the frontier."""
    once_rollouts: int | None = Field(default=None, ge=0)
    """With the method once: rollouts that it may spend on prompts before its slow steps, over as many fast rounds as
    they last for. 0: no search, the weights are trained under the program's own instructions. None: `max_rollouts`."""
    reflection_calls: int | None = Field(default=None, ge=0)
    """Most reflections in the whole run, by whichever reflector. None: no limit."""
    on_reflection_failure: Literal["stop", "continue"] = "stop"
    """What a run does whose reflection LM has failed at every call of a fast round, by a wrong key, a wrong name or a
    refused connection: `stop` before the next fast round, or `continue` without new instructions."""


class TrainConfig(Section, section="train"):
    """The weight side: T steps of policy gradient on one LoRA adapter."""

    steps_per_cycle: int = Field(default=6, ge=1)
    """T, slow steps after each fast round."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW on the LoRA matrices."""
    epochs: int = Field(default=1, ge=1)
    """Updates that each step makes from its batch, one after the other; still one policy version. From the second on
    the batch is off-policy: the importance weights, capped by `ratio_cap`, make up for it. Above 1 where rollouts cost
    more than updates; look at `clipped_share` in the step lines. Without effect in `gepa`."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL that a step may make against the version before it, in nats a token of its batch. A step that made more than
    1.5 times that is shortened, and the next ones begin with less of `lr`, which is then the highest rate: give it and
    `lr` together where steps are unsteady. None: no measuring, which saves two forward passes. Without effect in
    `gepa`."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    betas: Betas = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradient norm above which the gradient is scaled down. None: no clipping."""
    loss: Literal["cispo", "grpo", "dr_grpo"] = "cispo"
    """What a token's log-prob, ratio and advantage give; `train/losses.py` has the papers."""
    ratio_cap: float = Field(default=4.0, gt=0)
    """CISPO's tau: the largest importance weight, an absolute number."""
    clip_low: float = Field(default=0.2, ge=0)
    """grpo and dr_grpo: the ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """grpo and dr_grpo: the ratio is clipped above 1 + clip_high."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL-to-base penalty. 0 skips its forward pass. Above 0, groups of equal rewards are trained on too:
    they have no advantage, and this penalty acts on them."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus: the mean entropy in nats a token, over the whole vocabulary at each call's
    temperature, is taken off the loss. Above 0, it acts on groups of equal rewards too."""
    entropy_floor: float | None = Field(default=None, gt=0)
    """Entropy, in nats a token, below which a bonus on it is switched on, over `entropy_coef`; its weight grows step by
    step from 0.001 for as long as the batch is below. For runs whose `entropy` falls while rewards are still low. None:
    no floor. Without effect in `gepa`."""
    average: Literal["token", "rollout", "prompt"] = "token"
    """`token`: every token of the batch counts the same; `rollout`: every rollout does; `prompt`: every group does, and
    in it every token, as in the paper. Not used by dr_grpo, whose divisor is a constant."""
    credit: Literal["rollout", "predictor"] = "rollout"
    """`rollout`: every call of a rollout gets the rollout's advantage. `predictor`: each predictor's calls get one of
    their own, from a blend of the predictor's score, which the metric gives when it is called with `pred_name`, and
    the program's."""
    own_share: Annotated[float, Remedy("give a share from 0 to 1")] = Field(default=0.5, ge=0, le=1)
    """With `credit="predictor"`: how much of the blend is the predictor's own score, from 0 to 1."""
    baseline: Literal["group", "prompt", "mixed"] = "group"
    """What a rollout's reward is compared with: the mean of its example's `group`, over all prompts, as in the paper;
    the mean of those under the same `prompt`, so that a good answer to a bad prompt is reinforced too; or `mixed`. Try
    it where prompts differ so much that a group says more about them than about the weights. `gepa`: without effect."""
    baseline_share: Annotated[float, Remedy("give a share from 0 to 1")] = Field(default=0.5, ge=0, le=1)
    """With `baseline="mixed"`: how much of the baseline is the prompt's own mean, from 0 to 1."""
    scale_advantages: bool | None = None
    """Whether advantages are divided by their group's standard deviation (around its baselines). None: as the loss's
    paper has it, which is no for dr_grpo and yes for the others."""
    advantage_eps: float = Field(default=1e-4, gt=0)
    """Added to a group's standard deviation, where advantages are divided by it."""
    train_truncated: bool = True
    """Whether calls that ran into max_tokens are trained on. False masks them."""
    microbatch_tokens: int = Field(default=8192, ge=1)
    """Most padded tokens in one forward pass, where a single row is not longer. On CPU never more than 2048."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Non-finite losses or gradients in a row after which the run stops."""


class EvalConfig(Section, section="eval"):
    """How (candidate, policy version) pairs are compared on the validation set."""

    candidates: int = Field(default=1, ge=1)
    """Candidates validated after each cycle, best anchor means first."""
    max_examples: int | None = Field(default=None, ge=1)
    """Validation examples used, the first ones. None: all."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy decoding, as every score in the docs."""
    every_rollouts: int = Field(default=0, ge=0)
    """Fewest fast + slow rollouts from one validation to the next; what comes sooner is left out, but for those at the
    end of the run or of a stage. Raise it where validations take much of the time: pairs in between cannot be the best
    one, and `budget.patience` counts the cycles that were validated. 0: after each cycle and each new leader."""
    kl_examples: int = Field(default=32, ge=1)
    """Held-out examples on whose sampled tokens `kl_to_base` is measured."""


class BudgetConfig(Section, section="budget"):
    """When to stop."""

    max_cycles: int = Field(default=10, ge=1)
    """Cycles of a run."""
    max_rollouts: int | None = Field(default=None, ge=1)
    """Cap on fast + slow rollouts together; checked before spending. None: no cap."""
    stage_rollouts: int | None = Field(default=None, ge=1)
    """With `compile_stream`: fast + slow rollouts on each stage; a step that no longer fits begins the next one. It
    must be given there, and not elsewhere."""
    max_steps: int | None = Field(default=None, ge=1)
    """Cap on slow steps. None: no cap."""
    patience: int | None = Field(default=None, ge=1)
    """Cycles in a row without a better validation score after which the run stops. None: it never does for that."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds that the run may take, over all resumes. None: no cap. This one and the next two are looked at before
    every rollout: at the cap those in flight are finished, and the best pair so far is returned."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Cap on tokens that the policy samples, evaluations included. None: no cap."""
    max_cost_usd: float | None = Field(default=None, gt=0)
    """Dollars that reflection and other LMs in rollouts may cost. None: no cap, and prices may be unknown."""
    prices: Annotated[Mapping[str, PricePair], Remedy("give an object of models and prices")] = {}
    """Model -> dollars for a million prompt tokens, and for a million completion tokens. It holds for
    the reflection LM too; a name may leave the provider out. Models not named: nothing on own servers (`hosted_vllm`,
    `ollama`, ...), else as litellm's price table has them."""


class RunConfig(Section, section="run"):
    """How a run keeps what it has. Nothing here changes what is learned."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that stay on disk, the last included, and up to four more until as many different weights are among
    them; the best pair's adapter always does."""
    keep_versions: int = Field(default=0, ge=0)
    """Ends of cycles whose adapters stay on disk besides, for `fst lab drift`: at most so many, evenly spread over the
    run, and the last one. 0: none."""
    grace_s: float = Field(default=10.0, ge=0)
    """How long rollouts in flight may go on after Ctrl-C or SIGTERM, in seconds. A second Ctrl-C drops them."""
    dry_run: bool = True
    """Whether a new run first tries the student on two training examples, and the reflection LM with one call, and is
    refused where that shows a mistake."""


class FSTConfig(Section):
    """Everything that decides a run, but for the program, the data, the metric and the policy."""

    method: Method = "fst"
    """`fst`; `rl` (K = 1, seed instruction, no fast rounds); `gepa` (fast rounds only); `sequential` (half of the
    rollouts on GEPA, then the rest on RL with its best candidate); `once` (the same with `fast.once_rollouts` on GEPA).
    """
    allocation: Literal["fixed", "adaptive"] = "fixed"
    """`fixed`: each cycle has a fast round and then T slow steps. `adaptive`: each cycle goes to the side that gains
    more for a rollout, as far as is known (up to `fast.max_proposals` proposals, or up to T steps), and weights are
    trained under prompts that lead the seed instructions with some confidence, else under these. A cycle is then the
    turn of one side: `budget.max_rollouts` must be given, and `budget.max_cycles` be large. Use it where it is unclear
    whether prompts or weights have more to gain. Only the method fst has it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every random choice of a run follows from it, but for the adapter's first weights and its dropout: those follow
    from `Policy(seed=)`, to which the command line gives the same number."""
    fast: FastConfig = FastConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    budget: BudgetConfig = BudgetConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    run: RunConfig = RunConfig()
    distill: DistillConfig = DistillConfig()
    predictors: Annotated[
        Mapping[str, Role], Remedy('give an object of names and roles, e.g. {"answer": "train"}')
    ] = {}
    """Predictor name -> what may change: `both` its instruction and the weights by its calls, `evolve` the
    instruction alone, `train` the weights alone, `neither`. Those not named: `both`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        group, population = self.rollout.group_size, self.fast.population
        if self.method == "fst" and group % population:
            raise UserError(
                f"rollout.group_size is {group}: it must be divisible by fast.population ({population}), so that every "
                "candidate gets G/K rollouts"
            )
        sampled, temperature = self.fast.temperature, self.rollout.temperature
        if self.rollout.reuse != "none" and self.method not in ("rl", "gepa") and sampled != temperature:
            raise UserError(
                f"rollout.reuse is {self.rollout.reuse!r} and fast.temperature is {sampled}: a group takes rollouts "
                f"sampled at rollout.temperature alone; set fast.temperature={temperature}, or rollout.reuse='none'"
            )
        uncapped = self.budget.max_rollouts is None and self.budget.stage_rollouts is None
        if self.adapts and uncapped:
            raise UserError(
                "budget.max_rollouts is None: with allocation 'adaptive' a cycle is the turn of one side, and cycles "
                "do not say how much is spent; give a number, and a budget.max_cycles that does not end the run sooner"
            )
        if self.method == "sequential" and uncapped:
            raise UserError(
                "budget.max_rollouts is None: the sequential method spends half of it on GEPA, so give a number"
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether what is known of both sides' gains decides what a cycle does."""
        return self.method == "fst" and self.allocation == "adaptive"

    @property
    def searches_first(self) -> bool:
        """Whether the method evolves prompts before its first slow step alone, and then trains under the best one."""
        return self.method in ("sequential", "once")

    @property
    def search_rollouts(self) -> int | None:
        """Rollouts that the method may spend on prompts in the whole run. None: it sets no limit of its own."""
        if self.method == "rl":
            return 0
        if self.method == "sequential":
            return (self.budget.stage_rollouts or self.budget.max_rollouts or 0) // 2
        if self.method == "once":
            return self.fast.max_rollouts if self.fast.once_rollouts is None else self.fast.once_rollouts
        return None

    def trains(self, predictor: str) -> bool:
        """Whether this predictor's calls change the weights."""
        return self.predictors.get(predictor, "both") in ("both", "train")

    def evolves(self, predictor: str) -> bool:
        """Whether this predictor's instruction changes."""
        return self.predictors.get(predictor, "both") in ("both", "evolve")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base: FSTConfig | None = None) -> FSTConfig:
        """Nested settings over `base` (or the defaults). An unknown key raises UserError with the nearest name."""
        if not isinstance(data, Mapping) or not has_names(data):
            raise UserError(f"config is {data!r}: give an FSTConfig or an object of settings")
        return cls(**merged((base or cls()).given(), data))

    def complete(self) -> FSTConfig:
        """The same settings, all of them given: it means the same over any preset."""
        return FSTConfig(**self.to_dict())

    def with_values(self, values: Mapping[str, Any]) -> FSTConfig:
        """Dotted settings over this config, e.g. `{"train.lr": 1e-3}`."""
        return FSTConfig.from_dict(nested(values), self)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` as `{"train": {"lr": 1}}`; in `budget.prices.openai/gpt-5.2`, the model's dot is its own."""
    found: dict[str, Any] = {}
    for dotted, value in values.items():
        prefix = next((name for name in OPEN if dotted.startswith(f"{name}.")), "")
        path = [*prefix.split("."), dotted.removeprefix(f"{prefix}.")] if prefix else dotted.split(".")
        target = found
        for section in path[:-1]:
            target = target.setdefault(section, {})
        target[path[-1]] = value
    return found
