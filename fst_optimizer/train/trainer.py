"""The slow step: one batch of credited calls, `train.epochs` AdamW updates of the LoRA adapter.

The model is the engine's own object, so a step takes the model's lock, and leaves it in evaluation mode with the
trained adapter active.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from peft import PeftModel
from torch import Tensor

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.model.lora import active_adapter, seeded, snapshot, trained_parameters
from fst_optimizer.train.batch import (
    Batch,
    length_of,
    make_batch,
    plan_microbatches,
    signal_weights,
    token_weights,
    trainable,
)
from fst_optimizer.train.losses import LOSSES, Loss, kl_estimate
from fst_optimizer.train.pace import Pace, hold_back, next_bonus, next_scale, sampled_entropy
from fst_optimizer.train.report import StepReport
from fst_optimizer.train.scoring import check_head, logprobs, token_logprobs
from fst_optimizer.types import TrainRow

logger = logging.getLogger(__name__)

CPU_MICROBATCH_TOKENS = 2048
"""A CPU gains nothing from wider batches: they only fall out of its cache and pad more."""


class Trainer:
    """AdamW on the trained adapter of `model`, `config.epochs` updates per `step`.

    With several processes, every one is given the same rows, computes its share of the microbatches, and sums
    gradients once at the end: ranks need no equal numbers of microbatches. Of accelerate only that is used: its
    `Accelerator` keeps precision, accumulation and the sync flag per process, so that another trainer in the
    process would change ours, and preparing the model would wrap the `forward` that the engine generates with.
    Weights keep the model's own dtype; the LoRA matrices are float32.
    """

    def __init__(
        self,
        model: PeftModel,
        pad_id: int,
        config: TrainConfig,
        *,
        loss: Loss | None = None,
        lock: AbstractContextManager[Any] | None = None,
        max_completion_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Takes the trained adapter of `model` as it stands. `pad_id` may be any token: padding is never read.

        `loss` is one of `LOSSES` or another of their kind; None: the configured one. `lock` is taken for each step and
        each `logprobs`; generation with the same model holds it too. `max_completion_tokens` is dr_grpo's constant;
        None: the longest completion of each batch. `seed` decides, with the number of the update, what dropout drops;
        so no generator's state is saved.

        Raises:
            UserError: the model changes its logits after the LM head.
        """
        self._model, self._pad_id, self._config = model, pad_id, config
        self._lock = lock if lock is not None else nullcontext()
        self._max_completion_tokens = max_completion_tokens
        self._seed = seed
        self._parameters = trained_parameters(model)
        self._device = next(iter(self._parameters.values())).device
        self.loss = loss or configured_loss(config)
        self.optimizer = torch.optim.AdamW(
            self._parameters.values(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._microbatch_tokens = config.microbatch_tokens
        if self._device.type == "cpu":
            self._microbatch_tokens = min(config.microbatch_tokens, CPU_MICROBATCH_TOKENS)
        self.processes = PartialState()
        self._updates = 0
        """Steps that changed the weights, of however many epochs."""
        self._bad_steps = 0
        self._pace = Pace()
        self._entropy_coef = config.entropy_coef
        """In force in this step."""
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with self._lock:
            check_head(model, pad_id)

    def step(self, rows: Sequence[TrainRow]) -> StepReport:
        """`config.epochs` updates from `rows`, or none: no rows, or a loss or gradient that is not finite.

        In each epoch the ratio is that of the weights as they then are to the sampler. An epoch that is not finite ends
        the step; what the epochs before it did stays. Rows of flat groups change the weights only through the KL
        penalty and the entropy bonus.

        Raises:
            TrainingError: `config.max_bad_steps` non-finite steps in a row, or rows that cannot be trained on.
        """
        if not rows:
            return StepReport(updated=False, reason="every group was flat")
        kept = trainable(rows, self._config.train_truncated)
        if not kept:
            return StepReport(updated=False, reason="every completion was empty or truncated")
        pace = self._pace
        if (floor := self._config.entropy_floor) is not None:
            entropy = sampled_entropy(kept)
            pace = replace(pace, bonus=next_bonus(pace.bonus, entropy, floor))
            self._entropy_coef = self._config.entropy_coef + (pace.bonus if entropy < floor else 0.0)
            if not self._entropy_coef and not self._config.kl_coef:
                kept = [row for row in kept if not row.flat]  # no bonus is in force: they have nothing to teach
        if not kept:
            return StepReport(updated=False, reason="every group was flat")
        with self._lock:
            try:
                return self._step(kept, pace)
            finally:
                self.optimizer.zero_grad(set_to_none=True)

    def _step(self, rows: Sequence[TrainRow], pace: Pace) -> StepReport:
        """The epochs over `rows`, and what is kept of them with a target KL."""
        done, target, bad = StepReport(updated=False), self._config.target_kl, None
        for epoch in range(self._config.epochs):
            what = f"dropout/{self._seed}/{self._updates}" + (f"/{epoch}" if epoch else "")
            with seeded(random.Random(what).getrandbits(32), self._device):
                found = self._gradient_in_memory(rows)
            if not all(math.isfinite(value) for value in vars(found).values() if isinstance(value, float)):
                bad = found
                break
            if target is not None and not epoch:  # the first pass has found out what fits in memory
                start, before = snapshot(self._model), self._share_of_logprobs(rows)
            self._update(found)
            done = replace(found, epochs=epoch + 1)
        if target is not None and done.updated:
            share, kl = hold_back(self._model, start, lambda: self._kl_since(before, rows), target)
            done = replace(done, lr=done.lr * share, kl_to_last=kl)
            if not share:
                return replace(done, updated=False, epochs=0, reason=self._not_finite(done))
            pace = replace(pace, lr_scale=next_scale(pace.lr_scale, share, kl, target))
        if not done.updated and bad is not None:
            return replace(bad, updated=False, reason=self._not_finite(bad))
        self._updates += 1
        self._pace = pace
        if bad is not None:
            return replace(done, reason=f"epoch {done.epochs + 1} was left out: {self._not_finite(bad)}")
        self._bad_steps = 0
        return done

    def _share_of_logprobs(self, rows: Sequence[TrainRow]) -> Tensor:
        """Log-probs of this process's share of the tokens, as the weights now are, without dropout. Shape: (N,)."""
        mine = rows[self.processes.process_index :: self.processes.num_processes]
        found = logprobs(self._model, self._pad_id, [row.call for row in mine], self._microbatch_tokens)
        return torch.tensor([logprob for row in found for logprob in row], dtype=torch.float32)

    def _kl_since(self, before: Tensor, rows: Sequence[TrainRow]) -> float:
        """KL(pi before || pi now), nats a token, by `kl_estimate` on the batch's tokens.

        Both are the trainer's own log-probs: what the sampler's differ by is no step of the weights.
        """
        total = kl_estimate(before, self._share_of_logprobs(rows)).sum().to(self._device)
        if self.processes.num_processes > 1:
            total = reduce(total, reduction="sum")
        return float(total) / sum(len(row.call.completion_ids) for row in rows)

    def logprobs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        """Log-probs of the sampled tokens under the trained adapter, row by row, at each call's temperature."""
        with self._lock:
            return logprobs(self._model, self._pad_id, [row.call for row in rows], self._microbatch_tokens)

    def state(self) -> dict[str, Any]:
        """`{"tensors": name -> Tensor, "numbers": name -> number}`: all that a step depends on but weights and RNG.

        The tensors are copies. The weights are `lora.snapshot`'s to save, as a policy version.
        """
        tensors = {
            f"{name}.{key}": value.detach().clone()
            for name, parameter in self._parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        numbers = {"updates": self._updates, "bad_steps": self._bad_steps, **asdict(self._pace)}
        return {"tensors": tensors, "numbers": numbers}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state()` was taken; the next step is the same to the bit."""
        tensors, numbers = state["tensors"], {"updates": 0, "bad_steps": 0, **asdict(Pace()), **state["numbers"]}
        self.optimizer.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            if name not in self._parameters:
                raise TrainingError(f"the optimizer state names {name!r}, which this model's adapter does not have")
            parameter = self._parameters[name]
            self.optimizer.state[parameter][key] = value.detach().clone().to(parameter.device)
        self._updates, self._bad_steps = int(numbers["updates"]), int(numbers["bad_steps"])
        self._pace = Pace(float(numbers["lr_scale"]), float(numbers["bonus"]))

    def _gradient_in_memory(self, rows: Sequence[TrainRow]) -> StepReport:
        """`_gradient`; where memory does not suffice, again in microbatches of half the size, which stays."""
        while True:
            try:
                return self._gradient(failpoint("trainer.step", rows))
            except RuntimeError as error:
                # A GPU raises an error class of its own, the CPU allocator a plain RuntimeError.
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                longest = max(map(length_of, rows))
                if self._microbatch_tokens <= longest or self.processes.num_processes > 1:
                    raise TrainingError(
                        f"the slow step ran out of memory on {longest} tokens (microbatches of "
                        f"{self._microbatch_tokens}): set train.gradient_checkpointing=true, lower policy.max_tokens, "
                        "or give vLLM less of the GPU (vllm.gpu_memory_utilization)"
                    ) from error
                self._microbatch_tokens = max(longest, self._microbatch_tokens // 2)
            # Not in the handler: there the error still holds the tensors that fill the memory.
            self.optimizer.zero_grad(set_to_none=True)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "the slow step ran out of memory; going on with train.microbatch_tokens=%d", self._microbatch_tokens
            )

    def _gradient(self, rows: Sequence[TrainRow]) -> StepReport:
        """Accumulates the batch's gradient and reports on it. Waits for the device once, at the end."""
        average = "constant" if self._config.loss == "dr_grpo" else self._config.average
        weights, penalty_weights = (
            share(rows, average, self._max_completion_tokens) for share in (signal_weights, token_weights)
        )
        plan = plan_microbatches([length_of(row) for row in rows], self._microbatch_tokens)
        totals, largest = torch.zeros(len(TOTALS), device=self._device), torch.zeros(1, device=self._device)
        self._model.train()
        try:
            for micro in plan[self.processes.process_index :: self.processes.num_processes]:
                shares = ([given[i] for i in micro] for given in (weights, penalty_weights))
                batch = make_batch([rows[i] for i in micro], self._pad_id, *shares)
                found = self._accumulate(batch.to(self._device))
                totals, largest = totals + found[:-1], torch.maximum(largest, found[-1:])
        finally:
            self._model.eval()
        return self._report(totals, largest, rows)

    def _accumulate(self, batch: Batch) -> Tensor:
        """Adds one microbatch's share of the gradient. Returns its `TOTALS`, and behind them its largest ratio."""
        kl_coef, entropy_coef = self._config.kl_coef, self._entropy_coef
        if kl_coef:
            with torch.no_grad(), active_adapter(self._model, None):
                base_logprobs_BT, _ = token_logprobs(self._model, batch)
        logprobs_BT, entropy_N = token_logprobs(self._model, batch, entropy=True, entropy_gradient=entropy_coef > 0)
        loss_BT, ratio_BT, clipped_BT = self.loss(logprobs_BT, batch.old_logprobs_BT, batch.advantages_B)
        kl_BT = kl_estimate(logprobs_BT, base_logprobs_BT) if kl_coef else torch.zeros_like(loss_BT)
        loss = (loss_BT * batch.weights_BT).sum()
        if kl_coef:
            loss = loss + kl_coef * (kl_BT * batch.penalty_weights_BT).sum()
        if entropy_coef:
            loss = loss - entropy_coef * (entropy_N * batch.penalty_weights_BT[batch.completion_mask_BT]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        delta_BT = batch.advantages_B[:, None] * (logprobs_BT.detach() - batch.old_logprobs_BT)
        summed = [(t_BT * batch.completion_mask_BT).sum() for t_BT in (ratio_BT, clipped_BT, kl_BT.detach(), delta_BT)]
        most = (ratio_BT * batch.completion_mask_BT).max()
        return torch.stack([loss.detach(), entropy_N.detach().sum(), *summed, most])

    def _report(self, totals: Tensor, largest: Tensor, rows: Sequence[TrainRow]) -> StepReport:
        """The batch's means and its gradient's norm, over all processes."""
        if self.processes.num_processes > 1:
            for parameter in self._parameters.values():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = reduce(gradient, reduction="sum")
            totals, largest = reduce(totals, reduction="sum"), gather(largest).max()[None]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        norm, most, loss, *sums = torch.cat([grad_norm[None], largest, totals]).tolist()
        tokens = sum(len(row.call.completion_ids) for row in rows)
        with_signal = sum(len(row.call.completion_ids) for row in rows if not row.flat)
        means = {name: total / tokens for name, total in zip(TOTALS[1:], sums, strict=True)}
        means["advantage_delta"] *= tokens / max(1, with_signal)
        if not self._config.kl_coef:
            del means["kl"]
        # A linear warm-up whose last step reaches the peak, then constant.
        lr = self._config.lr * min(1.0, (self._updates + 1) / max(1, self._config.warmup_steps))
        return StepReport(
            updated=True,
            loss=loss,
            grad_norm=norm,
            ratio_max=most,
            entropy_coef=self._entropy_coef,
            tokens=tokens,
            lr=lr * self._pace.lr_scale,
            **means,
        )

    def _update(self, report: StepReport) -> None:
        limit = self._config.max_grad_norm
        if limit is not None and report.grad_norm > limit:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / (report.grad_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = report.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _not_finite(self, found: StepReport) -> str:
        """Counts a bad step, and says what was not finite in it."""
        self._bad_steps += 1
        numbers = {"loss": found.loss, "gradient": found.grad_norm, "KL to the version before": found.kl_to_last}
        what = next((name for name, value in numbers.items() if not math.isfinite(value or 0.0)), "gradient")
        logger.warning("step skipped, the %s is not finite (%d in a row)", what, self._bad_steps)
        if self._bad_steps >= self._config.max_bad_steps:
            raise TrainingError(
                f"{self._bad_steps} steps in a row gave a loss or gradient that is not finite (last: loss "
                f"{found.loss}, gradient norm {found.grad_norm}): resume with a lower train.lr, and --allow-changes"
            )
        return f"the {what} was not finite"


TOTALS = ("loss", "entropy", "ratio_mean", "clipped_share", "kl", "advantage_delta")


def configured_loss(config: TrainConfig) -> Loss:
    """The configured loss with its settings: a loss names its keyword parameters as `TrainConfig` does."""
    loss = LOSSES[config.loss]
    settings = [p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return partial(loss, **{name: getattr(config, name) for name in settings})
