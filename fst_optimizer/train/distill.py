"""On-policy distillation: the trained adapter learns what a frozen one says under other instructions.

The student sampled the tokens under its own prompt. At each of them the loss is the reverse KL(student || teacher), the
teacher being another version of the same model that sees the same inputs under its own instructions and the same tokens
so far (`Call.teacher_ids`). No gradient goes through the sampling.

Source: on-policy distillation with the reverse KL, arXiv 2306.13649 (GKD) and 2306.08543 (MiniLLM). There teacher and
student are two models; here they are one, and their prompts differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.model.lora import active_adapter, temporary_adapter
from fst_optimizer.train.batch import Batch, length_of, make_batch, plan_microbatches, token_weights
from fst_optimizer.train.losses import full_kl, sampled_kl, token_entropy
from fst_optimizer.train.report import StepReport
from fst_optimizer.train.scoring import by_chunks, completion_hidden, lm_head
from fst_optimizer.train.trainer import TOTALS, Trainer
from fst_optimizer.types import TrainRow

logger = logging.getLogger(__name__)


def under_teacher(row: TrainRow) -> TrainRow:
    """The row with the teacher's prompt in place of its own."""
    return replace(row, call=replace(row.call, prompt_ids=row.call.teacher_ids))


def kl_to_teacher(
    model: PeftModel, teacher: str | None, own: Batch, taught: Batch, *, full: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What the completion tokens of a batch give: their loss, their KL and the student's entropy there, in nats.

    Shapes: three of (N,), N completion tokens; the loss alone has a gradient. `own` and `taught` are the same rows
    under either prompt. `teacher` is a version that `lora.add_version` added; None: the base. With `full` the loss is
    the KL over the vocabulary; else it has the gradient of the sampled token's estimate of it.
    """
    head = lm_head(model)
    with torch.no_grad(), active_adapter(model, teacher):
        training = model.training
        model.eval()  # the teacher drops nothing out
        try:
            taught_NH = completion_hidden(model, taught)
        finally:
            model.train(training)
    mask_BT = own.completion_mask_BT
    temperatures_N1 = own.temperatures_B[:, None].expand_as(mask_BT)[mask_BT][:, None]
    ids_N = own.input_ids_BT[mask_BT]

    def score(own_NH: Tensor, taught_NH: Tensor, ids_N: Tensor, temperatures_N1: Tensor) -> tuple[Tensor, ...]:
        logits_NV = head(own_NH).float() / temperatures_N1
        with torch.no_grad():
            taught_NV = head(taught_NH).float() / temperatures_N1
            entropy_N = token_entropy(torch.log_softmax(logits_NV.detach(), -1))
        if full:
            kl_N = full_kl(logits_NV, taught_NV)
            return kl_N, kl_N.detach(), entropy_N
        return (*sampled_kl(*(_logprobs(one_NV, ids_N) for one_NV in (logits_NV, taught_NV))), entropy_N)

    chunks = list(by_chunks(head, completion_hidden(model, own), taught_NH, ids_N, temperatures_N1))
    recomputed: Any = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    scored = [score(*chunk) if len(chunks) == 1 else recomputed(*chunk) for chunk in chunks]
    loss_N, kl_N, entropy_N = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return loss_N, kl_N, entropy_N


def _logprobs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV, -1).gather(-1, ids_N[:, None])[:, 0]


class Distiller(Trainer):
    """A `Trainer` whose loss is the KL to a teacher: rows' advantages are not looked at, each has `teacher_ids`.

    `report.loss` is the mean KL in nats a token, by `train.average`; `advantage_delta`, `ratio_mean` and
    `clipped_share` say nothing.
    """

    def __init__(
        self,
        model: PeftModel,
        pad_id: int,
        config: TrainConfig,
        teacher: Mapping[str, Tensor] | None,
        *,
        full: bool = True,
        **settings: Any,
    ) -> None:
        """`teacher`: its LoRA tensors; None: the base. `full`: whether the KL is over the whole vocabulary."""
        super().__init__(model, pad_id, config, **settings)
        self._teacher = teacher
        self.full = full

    def _gradient_in_memory(self, rows: Sequence[TrainRow]) -> StepReport:
        """As a trainer's; where memory does not suffice for the whole vocabulary, by the sampled tokens from now on."""
        try:
            return super()._gradient_in_memory(rows)
        except TrainingError as error:
            if not self.full or not isinstance(error.__cause__, RuntimeError) or self.processes.num_processes > 1:
                raise
        self.full = False
        self.optimizer.zero_grad(set_to_none=True)
        logger.warning("distilling ran out of memory; going on with distill.full_vocabulary=false")
        return super()._gradient_in_memory(rows)

    def _gradient(self, rows: Sequence[TrainRow]) -> StepReport:
        """Accumulates the batch's gradient and reports on it."""
        taught = [under_teacher(row) for row in rows]
        average = "constant" if self._config.loss == "dr_grpo" else self._config.average
        weights = token_weights(rows, average, self._max_completion_tokens)
        longest = [max(length_of(one), length_of(other)) for one, other in zip(rows, taught, strict=True)]
        plan = plan_microbatches(longest, self._microbatch_tokens)
        totals = torch.zeros(len(TOTALS), device=self._device)
        self._model.train()
        try:
            with temporary_adapter(self._model, self._teacher) as teacher:
                for micro in plan[self.processes.process_index :: self.processes.num_processes]:
                    own = make_batch([rows[i] for i in micro], self._pad_id, [weights[i] for i in micro])
                    other = make_batch([taught[i] for i in micro], self._pad_id)
                    totals += self._learn(teacher, own.to(self._device), other.to(self._device))
        finally:
            self._model.eval()
        return self._report(totals, totals.new_ones(1), rows)

    def _learn(self, teacher: str | None, own: Batch, taught: Batch) -> Tensor:
        """Adds one microbatch's share of the gradient. Returns its totals."""
        loss_N, kl_N, entropy_N = kl_to_teacher(self._model, teacher, own, taught, full=self.full)
        weights_N = own.weights_BT[own.completion_mask_BT]
        (loss_N * weights_N).sum().backward()  # type: ignore[no-untyped-call]
        found = {"loss": (kl_N * weights_N).sum(), "entropy": entropy_N.sum()}
        found["ratio_mean"] = loss_N.new_tensor(len(kl_N))  # 1 for each: the rollouts are the student's own
        return torch.stack([found.get(name, loss_N.new_zeros(())) for name in TOTALS])
