"""Log-probs of completion tokens, without ever holding the logits of a whole batch.

The backbone runs once over the padded rows. Only positions that predict a completion token go through the LM head,
in chunks that are recomputed in the backward pass where the vocabulary is large. TRL's `add_fused_lm_head` does
the same, but with one temperature for the whole model and, without Triton, over every position; ours is per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fst_optimizer.errors import TrainingError, UserError
from fst_optimizer.model.lora import active_adapter
from fst_optimizer.train.batch import Batch, length_of, make_batch, plan_microbatches, trainable
from fst_optimizer.train.losses import full_kl
from fst_optimizer.types import Call, TrainRow

CHUNK_LOGITS = 2**25
"""Most logits held at once: 128 MiB in float32."""


def completion_hidden(model: PeftModel, batch: Batch) -> Tensor:
    """Hidden states that predict the completion tokens, row by row. Shape: (N, H), N completion tokens.

    No attention mask: padding is on the right, so under causal attention no real token sees it, and without a
    mask attention takes its fastest kernel.
    """
    causal_lm = cast(Any, model.get_base_model())
    hidden_BTH = causal_lm.base_model(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    predicts_BT = batch.completion_mask_BT.roll(-1, 1)
    return cast(Tensor, hidden_BTH.flatten(0, 1).index_select(0, predicts_BT.flatten().nonzero()[:, 0]))


def lm_head(model: PeftModel) -> nn.Module:
    """The module that turns hidden states into logits."""
    return cast(nn.Module, cast(Any, model.get_base_model()).get_output_embeddings())


def token_logprobs(model: PeftModel, batch: Batch, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token at its row's temperature, and the entropies there. In nats.

    Shapes: (B, T) with 0 outside the completion, and (N,) without gradient, N completion tokens, or (0,) unless
    `entropy`.
    """
    mask_BT = batch.completion_mask_BT
    ids_N = batch.input_ids_BT[mask_BT]
    temperatures_N1 = batch.temperatures_B[:, None].expand_as(mask_BT)[mask_BT][:, None]
    score = _scorer(lm_head(model), entropy)
    chunks = list(_chunks(_vocabulary(model), completion_hidden(model, batch), ids_N, temperatures_N1))
    # One chunk fits in memory: recomputing it would only cost time.
    run: Callable[..., Any] = score if len(chunks) == 1 else _recomputed(score)
    scored = [run(*chunk) for chunk in chunks]
    logprobs_N = torch.cat([logprobs for logprobs, _ in scored])
    logprobs_BT = torch.zeros(mask_BT.shape, device=logprobs_N.device).masked_scatter(mask_BT, logprobs_N)
    return logprobs_BT, torch.cat([entropies for _, entropies in scored])


def paired_logits(model: PeftModel, *hiddens_NH: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Logits of several hidden states of the same tokens, chunk by chunk. The LM head carries no adapter."""
    head = lm_head(model)
    for chunks in _chunks(_vocabulary(model), *hiddens_NH):
        yield tuple(head(chunk) for chunk in chunks)


@torch.no_grad()
def logprobs(model: PeftModel, pad_id: int, calls: Sequence[Call], microbatch_tokens: int = 8192) -> list[list[float]]:
    """Log-probs of the calls' completion tokens under the adapter that is active, at each call's temperature.

    The caller holds the model's lock. A call without tokens gives an empty list.
    """
    rows = [TrainRow(call, 0.0, 0) for call in calls]
    result: list[list[float]] = [[] for _ in rows]
    scored = [index for index, row in enumerate(rows) if row.call.completion_ids]
    device = next(model.parameters()).device
    for micro in plan_microbatches([length_of(rows[i]) for i in scored], microbatch_tokens):
        indices = [scored[i] for i in micro]
        batch = make_batch([rows[i] for i in indices], pad_id).to(device)
        logprobs_BT, _ = token_logprobs(model, batch)
        for i, row_T, mask_T in zip(indices, logprobs_BT, batch.completion_mask_BT, strict=True):
            result[i] = row_T[mask_T].tolist()
    return result


def kl_to_base(
    model: PeftModel,
    pad_id: int,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    version_name: str | None,
    microbatch_tokens: int = 8192,
) -> float:
    """Mean over completion tokens of KL(pi_version || pi_base) over the full vocabulary, in nats, at temperature 1.

    Args:
        model: holds adapter `version_name`; None means the base itself, whose KL is 0. The caller holds its lock.
        pad_id: any token id.
        rows: (prompt ids, completion ids); both policies see the same.
        version_name: a version that `lora.add_version` added, or "default".
        microbatch_tokens: most padded tokens in one forward pass.

    Raises:
        TrainingError: no row has a completion token.
    """
    train_rows = trainable([_unscored_row(prompt, completion) for prompt, completion in rows])
    if not train_rows:
        raise TrainingError("kl_to_base was given no completion token to measure on")
    device = next(model.parameters()).device
    total = 0.0
    for micro in plan_microbatches([length_of(row) for row in train_rows], microbatch_tokens):
        batch = make_batch([train_rows[i] for i in micro], pad_id).to(device)
        total += _summed_kl(model, batch, version_name)
    return total / sum(len(row.call.completion_ids) for row in train_rows)


def _unscored_row(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> TrainRow:
    logprobs = (0.0,) * len(completion_ids)
    return TrainRow(Call("", tuple(prompt_ids), tuple(completion_ids), logprobs, 1.0, 0, "stop"), 0.0, 0)


@torch.no_grad()
def _summed_kl(model: PeftModel, batch: Batch, version_name: str | None) -> float:
    with active_adapter(model, version_name):
        hidden_NH = completion_hidden(model, batch)
    with active_adapter(model, None):
        base_hidden_NH = completion_hidden(model, batch)
    return sum(float(full_kl(p, q).sum()) for p, q in paired_logits(model, hidden_NH, base_hidden_NH))


def check_head(model: PeftModel, pad_id: int) -> None:
    """Refuses models that change the logits after the LM head (soft caps, scales), whose log-probs would be wrong.

    Raises:
        UserError: naming the architecture.
    """
    ids_BT = torch.full((1, 2), pad_id, device=next(model.parameters()).device)
    causal_lm = cast(Any, model.get_base_model())
    with torch.no_grad():
        ours = lm_head(model)(causal_lm.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
        theirs = causal_lm(input_ids=ids_BT, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"model is a {type(causal_lm).__name__}, which changes the logits after its LM head: the trainer cannot "
            "reproduce its log-probs. Use a model without a logit soft cap or scale, e.g. Qwen3 or Llama"
        )


def _scorer(head: nn.Module, entropy: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def score(hidden_NH: Tensor, ids_N: Tensor, temperatures_N1: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_NV = torch.log_softmax(head(hidden_NH).float() / temperatures_N1, -1)
        logprobs_N = logprobs_NV.gather(-1, ids_N[:, None])[:, 0]
        if not entropy:
            return logprobs_N, logprobs_N.new_empty(0)
        detached_NV = logprobs_NV.detach()
        return logprobs_N, -(detached_NV.exp() * detached_NV).sum(-1)

    return score


def _recomputed(score: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: checkpoint(score, *tensors, use_reentrant=False, preserve_rng_state=False)


def _vocabulary(model: PeftModel) -> int:
    return int(cast(Any, lm_head(model)).weight.shape[0])


def _chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
