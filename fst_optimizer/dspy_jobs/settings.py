"""dspy's `train_kwargs`, a plain dictionary, as settings of ours: our own names, and TRL's where they mean the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

Kwargs = dict[str, Any]

OPTIMIZER = ("lr", "warmup_steps", "betas", "weight_decay", "max_grad_norm", "average", "max_bad_steps")
MEMORY = ("microbatch_tokens", "gradient_checkpointing")
REINFORCE = ("loss", "ratio_cap", "clip_low", "clip_high", "kl_coef", "advantage_eps", "train_truncated")
"""Fields of `TrainConfig`, by who understands them."""

RENAMED = {"learning_rate": "lr", "beta": "kl_coef"}
"""TRL's name -> ours."""
LOSS_TYPES = {
    "grpo": {"loss": "grpo", "average": "rollout"},
    "dapo": {"loss": "grpo", "average": "token"},
    "bnpo": {"loss": "grpo", "average": "token"},
    "dr_grpo": {"loss": "dr_grpo"},
    "cispo": {"loss": "cispo", "average": "token"},
}
"""TRL's `loss_type` -> our loss and what it is averaged over."""
ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "lora": ((True,), "a policy trains its LoRA adapter"),
    "use_peft": ((True,), "a policy trains its LoRA adapter"),
    "lr_scheduler_type": (("constant", "constant_with_warmup"), "after warmup_steps the rate is constant"),
    "max_prompt_length": ((None,), "prompts are never cut"),
    "max_completion_length": ((None,), "set max_tokens on the Policy or on the predictor"),
    "max_seq_length": ((None,), "rows are never cut; leave long ones out"),
    "max_length": ((None,), "rows are never cut; leave long ones out"),
    "num_iterations": ((1,), "one batch is one update"),
    "scale_rewards": ((True, "group"), "rewards are divided by their group's standard deviation"),
}
"""Name -> values that ask for nothing else than what is done, and what that is."""
WITHOUT_EFFECT = {
    "bf16": "the dtype is the policy's",
    "fp16": "the dtype is the policy's",
    "packing": "micro-batches are ragged; see microbatch_tokens",
    "gradient_checkpointing_kwargs": "gradient_checkpointing alone decides",
    "report_to": "nothing is reported to trackers",
    "logging_steps": "see job.report",
    "log_completions": "completions are not logged",
    "save_steps": "call job.save_checkpoint",
}
"""Settings of other trainers that change nothing here, and why; they are named in a warning."""
REINFORCE_WITHOUT_EFFECT = {
    "per_device_train_batch_size": "all groups of a step are one update; see microbatch_tokens",
    "gradient_accumulation_steps": "all groups of a step are one update; see microbatch_tokens",
}


@dataclass(frozen=True)
class ReinforceSettings:
    """How a reinforce job (`dspy.teleprompt.grpo.GRPO`) trains."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Of the slow step. What belongs to FST's cycles or rollouts in it is not used."""
    temperature: float | None = None
    """What calls sample at that ask for none, while the job runs. None: the policy's own, or 1 where that is greedy:
    a group of equal answers teaches nothing."""
    memory: int = 20_000
    """Most completions that are remembered to be matched with what dspy hands over. A step needs its own."""
    num_generations: int | None = None
    """Completions in a group, as GRPO says it; it is checked, not used. None: any number."""
    output_dir: str | None = None
    """Where `save_checkpoint` writes adapters."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, optional=True)
        check_whole("memory", self.memory)
        if self.num_generations is not None:
            check_whole("num_generations", self.num_generations)
            if self.num_generations == 1:
                raise UserError(
                    "num_generations is 1: a group of one has no baseline, so nothing would be learned; give GRPO "
                    "num_rollouts_per_grpo_step=8 or so"
                )


@dataclass(frozen=True)
class FinetuneSettings:
    """How a finetune job (`dspy.BootstrapFinetune`) trains."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=2e-4, warmup_steps=0))
    """The optimizer's part of it; the loss is the likelihood of the data."""
    epochs: int = 3
    """Times that every row is seen."""
    batch_size: int = 16
    """Rows of one update."""
    seed: int = 0
    """Decides the order of the rows."""
    output_dir: str | None = None
    """Where the trained adapter is written, besides being served. None: nowhere."""

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)


def reinforce_settings(train_kwargs: Mapping[str, Any] | None) -> ReinforceSettings:
    """`train_kwargs` of a reinforce job.

    Raises:
        UserError: An unknown name (with the nearest one), or a value that does not fit.
    """
    own = ("temperature", "memory", "num_generations", "output_dir")
    aliases: dict[str, Alias] = {
        **_OPTIMIZER_ALIASES,
        "beta": _renamed,
        "loss_type": _loss_type,
        "epsilon": _epsilon,
        "epsilon_high": _epsilon_high,
        "mask_truncated_completions": _mask_truncated,
    }
    given = _translated(
        train_kwargs, (*OPTIMIZER, *MEMORY, *REINFORCE, *own), aliases, WITHOUT_EFFECT | REINFORCE_WITHOUT_EFFECT
    )
    mine = {name: given.pop(name) for name in own if name in given}
    return ReinforceSettings(TrainConfig(**given), **mine)


def finetune_settings(train_kwargs: Mapping[str, Any] | None) -> FinetuneSettings:
    """`train_kwargs` of a finetune job.

    Raises:
        UserError: An unknown name (with the nearest one), or a value that does not fit.
    """
    own = ("epochs", "batch_size", "seed", "output_dir")
    aliases: dict[str, Alias] = {
        **_OPTIMIZER_ALIASES,
        "num_train_epochs": _epochs,
        "per_device_train_batch_size": _batch_size,
        "gradient_accumulation_steps": _batch_size,
    }
    given = _translated(train_kwargs, (*OPTIMIZER, *MEMORY, *own), aliases, WITHOUT_EFFECT)
    mine = {name: given.pop(name) for name in own if name in given}
    return FinetuneSettings(FinetuneSettings().train.changed(**given), **mine)


Alias = Callable[[str, Kwargs], Kwargs]
"""From a name of another trainer and all that was given, settings of ours."""


def _translated(
    train_kwargs: Mapping[str, Any] | None,
    known: tuple[str, ...],
    aliases: Mapping[str, Alias],
    idle: Mapping[str, str],
) -> Kwargs:
    """The settings by our names."""
    given = dict(train_kwargs or {})
    _check_names(given, (*known, *aliases, *ONLY, *idle))
    for name in [name for name in given if name in idle]:
        logger.warning("train_kwargs: %s has no effect here: %s", name, idle[name])
    result = {name: value for name, value in given.items() if name in known}
    made: Kwargs = {}
    for name in [name for name in given if name in aliases]:
        made |= aliases[name](name, given)
        twice = sorted(made.keys() & result.keys())
        if twice:
            raise UserError(f"train_kwargs has both {name!r} and {twice[0]!r}, which set the same: give one of them")
    return {**result, **made}


def _check_names(given: Kwargs, known: tuple[str, ...]) -> None:
    for name, value in given.items():
        if name not in known:
            raise UserError(f"train_kwargs has unknown {name!r}; {did_you_mean(str(name), known)}")
        if name in ONLY and value not in ONLY[name][0]:
            allowed, what = ONLY[name]
            raise UserError(
                f"train_kwargs: {name} is {value!r}: {what}; give {' or '.join(map(repr, allowed))}, or leave it out"
            )


def _renamed(name: str, given: Kwargs) -> Kwargs:
    return {RENAMED[name]: given[name]}


def _betas(name: str, given: Kwargs) -> Kwargs:
    return {"betas": (given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999))}


def _loss_type(name: str, given: Kwargs) -> Kwargs:
    if given[name] not in LOSS_TYPES:
        raise UserError(f"train_kwargs: {name} is {given[name]!r}: {did_you_mean(str(given[name]), LOSS_TYPES)}")
    return LOSS_TYPES[given[name]]


def _epsilon(name: str, given: Kwargs) -> Kwargs:
    if given.get("epsilon_high") is None:
        return {"clip_low": given[name], "clip_high": given[name]}
    return {"clip_low": given[name]}


def _epsilon_high(name: str, given: Kwargs) -> Kwargs:
    """CISPO's cap in TRL, the upper clip of the others. None is TRL's "as epsilon"."""
    if given[name] is None:
        return {}
    cispo = (given.get("loss") or given.get("loss_type") or TrainConfig().loss) == "cispo"
    return {"ratio_cap" if cispo else "clip_high": given[name]}


def _mask_truncated(name: str, given: Kwargs) -> Kwargs:
    return {"train_truncated": not given[name]}


def _epochs(name: str, given: Kwargs) -> Kwargs:
    epochs = given[name]
    return {"epochs": int(epochs) if isinstance(epochs, float) and epochs.is_integer() else epochs}


def _batch_size(name: str, given: Kwargs) -> Kwargs:
    """Rows of one update, which is all that the two numbers say together."""
    rows, times = given.get("per_device_train_batch_size", 1), given.get("gradient_accumulation_steps", 1)
    check_whole("per_device_train_batch_size", rows)
    check_whole("gradient_accumulation_steps", times)
    return {"batch_size": rows * times}


_OPTIMIZER_ALIASES: dict[str, Alias] = {"learning_rate": _renamed, "adam_beta1": _betas, "adam_beta2": _betas}


def check_whole(name: str, value: object, minimum: int = 1) -> None:
    """A whole number of at least `minimum`, or UserError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"train_kwargs: {name} is {value!r}: give a whole number of at least {minimum}")


def check_number(name: str, value: object, minimum: float, *, optional: bool = False) -> None:
    """A number of at least `minimum`, or UserError."""
    if optional and value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value < float("inf"):
        raise UserError(f"train_kwargs: {name} is {value!r}: give a number of at least {minimum}")
