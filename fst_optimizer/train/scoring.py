"""Log-probs of completion tokens, without ever holding the logits of a whole batch.

The backbone runs once over the padded rows. Only positions that predict a completion token go through the LM head,
in chunks that are recomputed in the backward pass where the vocabulary is large. TRL's `add_fused_lm_head` does
the same, but with one temperature for the whole model and, without Triton, over every position; ours is per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fst_optimizer.errors import TrainingError, UserError
from fst_optimizer.model.lora import active_adapter
from fst_optimizer.train.batch import Batch, length_of, make_batch, plan_microbatches
from fst_optimizer.train.losses import full_kl, token_entropy
from fst_optimizer.types import Call, TrainRow

CHUNK_LOGITS = 2**25
"""Most logits held at once: 128 MiB in float32."""


def completion_hidden(model: PeftModel, batch: Batch) -> Tensor:
    """Hidden states that predict the completion tokens, row by row. Shape: (N, H), N completion tokens.

    No attention mask: padding is on the right, so under causal attention no real token sees it, and without a
    mask attention takes its fastest kernel.
    """
    hidden_BTH: Tensor = (
        model.get_base_model().base_model(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    )
    predicts_BT = batch.completion_mask_BT.roll(-1, 1)
    return hidden_BTH.flatten(0, 1).index_select(0, predicts_BT.flatten().nonzero()[:, 0])


def lm_head(model: PeftModel) -> Any:
    """The module that turns hidden states into logits. It carries no adapter."""
    return model.get_base_model().get_output_embeddings()


def token_logprobs(
    model: PeftModel, batch: Batch, *, entropy: bool = False, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token at its row's temperature, and the entropies there. In nats.

    Shapes: (B, T) with 0 outside the completion, and (N,), N completion tokens, or (0,) unless `entropy`. The entropies
    have a gradient with `entropy_gradient` alone.
    """
    head = lm_head(model)

    def score(hidden_NH: Tensor, ids_N: Tensor, temperatures_N1: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_NV = torch.log_softmax(head(hidden_NH).float() / temperatures_N1, -1)
        logprobs_N = logprobs_NV.gather(-1, ids_N[:, None])[:, 0]
        if not entropy:
            return logprobs_N, logprobs_N.new_empty(0)
        return logprobs_N, token_entropy(logprobs_NV if entropy_gradient else logprobs_NV.detach())

    mask_BT = batch.completion_mask_BT
    temperatures_N1 = batch.temperatures_B[:, None].expand_as(mask_BT)[mask_BT][:, None]
    chunks = list(by_chunks(head, completion_hidden(model, batch), batch.input_ids_BT[mask_BT], temperatures_N1))
    # One chunk fits in memory: recomputing it would only cost time.
    recomputed = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    scored = [score(*chunk) if len(chunks) == 1 else recomputed(*chunk) for chunk in chunks]
    logprobs_N = torch.cat([logprobs for logprobs, _ in scored])
    logprobs_BT = torch.zeros(mask_BT.shape, device=logprobs_N.device).masked_scatter(mask_BT, logprobs_N)
    return logprobs_BT, torch.cat([entropies for _, entropies in scored])


def by_chunks(head: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors that have a row per token, split where their logits would be more than `CHUNK_LOGITS`."""
    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def _microbatches(
    model: PeftModel, pad_id: int, calls: Sequence[Call], max_padded_tokens: int
) -> Iterator[tuple[list[int], Batch]]:
    """The calls that have tokens, on the model's device: their places, and a batch of them."""
    rows = [TrainRow(call, 0.0, rollout=0, group=0) for call in calls]
    scored = [place for place, call in enumerate(calls) if call.completion_ids]
    for micro in plan_microbatches([length_of(rows[place]) for place in scored], max_padded_tokens):
        places = [scored[i] for i in micro]
        yield places, make_batch([rows[place] for place in places], pad_id).to(next(model.parameters()).device)


@torch.no_grad()
def logprobs(model: PeftModel, pad_id: int, calls: Sequence[Call], microbatch_tokens: int = 8192) -> list[list[float]]:
    """Log-probs of the calls' completion tokens under the adapter that is active, at each call's temperature.

    The caller holds the model's lock. A call without tokens gives an empty list.
    """
    result: list[list[float]] = [[] for _ in calls]
    for places, batch in _microbatches(model, pad_id, calls, microbatch_tokens):
        logprobs_BT, _ = token_logprobs(model, batch)
        for place, row_T, mask_T in zip(places, logprobs_BT, batch.completion_mask_BT, strict=True):
            result[place] = row_T[mask_T].tolist()
    return result


@torch.no_grad()
def kl_to_base(
    model: PeftModel, pad_id: int, calls: Sequence[Call], version_name: str | None, microbatch_tokens: int = 8192
) -> float:
    """Mean over completion tokens of KL(pi_version || pi_base) over the full vocabulary, in nats, at temperature 1.

    `version_name` is a version that `lora.add_version` added, or "default"; None means the base itself, whose KL is 0.
    Both policies see the same prompts. The caller holds the model's lock.

    Raises:
        TrainingError: no call has a completion token.
    """
    tokens = sum(len(call.completion_ids) for call in calls)
    if not tokens:
        raise TrainingError("kl_to_base was given no completion token to measure on")
    head = lm_head(model)
    total = 0.0
    for _, batch in _microbatches(model, pad_id, calls, microbatch_tokens):
        with active_adapter(model, version_name):
            hidden_NH = completion_hidden(model, batch)
        with active_adapter(model, None):
            base_hidden_NH = completion_hidden(model, batch)
        total += sum(float(full_kl(head(p), head(q)).sum()) for p, q in by_chunks(head, hidden_NH, base_hidden_NH))
    return total / tokens


@torch.no_grad()
def mean_entropy(model: PeftModel, pad_id: int, calls: Sequence[Call], microbatch_tokens: int = 8192) -> float:
    """Mean entropy over the calls' completion tokens under the adapter that is active, in nats; 0 without tokens.

    The caller holds the model's lock.
    """
    total, tokens = 0.0, 0
    for _, batch in _microbatches(model, pad_id, calls, microbatch_tokens):
        _, entropy_N = token_logprobs(model, batch, entropy=True)
        total, tokens = total + float(entropy_N.sum()), tokens + len(entropy_N)
    return total / max(1, tokens)


def check_head(model: PeftModel, pad_id: int) -> None:
    """Refuses models that change the logits after the LM head (soft caps, scales), whose log-probs would be wrong.

    Raises:
        UserError: naming the architecture.
    """
    ids_BT = torch.full((1, 2), pad_id, device=next(model.parameters()).device)
    causal_lm = model.get_base_model()
    with torch.no_grad():
        ours = lm_head(model)(causal_lm.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
        theirs = causal_lm(input_ids=ids_BT, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"model is a {type(causal_lm).__name__}, which changes the logits after its LM head: the trainer cannot "
            "reproduce its log-probs. Use a model without a logit soft cap or scale, e.g. Qwen3 or Llama"
        )
