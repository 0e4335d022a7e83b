from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from fst_optimizer.errors import UserError
from fst_optimizer.model import lora
from fst_optimizer.train import scoring
from fst_optimizer.train.batch import make_batch
from fst_optimizer.train.losses import full_kl
from fst_optimizer.train.scoring import kl_to_base
from fst_optimizer.types import Call, TrainRow

MakeRows = Callable[..., list[TrainRow]]
Moved = Callable[[PeftModel], PeftModel]


@pytest.mark.parametrize("chunk_logits", [2**25, 64 * 3])
def test_logprobs_and_entropies_equal_plain_forwards(
    model: PeftModel,
    moved: Moved,
    make_rows: MakeRows,
    slow_logprobs: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    chunk_logits: int,
) -> None:
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", chunk_logits)
    rows = make_rows(9)
    batch = make_batch(rows, pad_id=0)
    with torch.no_grad():
        logprobs_BT, entropies_N = scoring.token_logprobs(moved(model), batch, entropy=True)
        expected = [slow_logprobs(model, row) for row in rows]
        assert torch.equal(logprobs_BT != 0, batch.completion_mask_BT)
        for row_T, mask_T, expected_T in zip(logprobs_BT, batch.completion_mask_BT, expected, strict=True):
            assert torch.allclose(row_T[mask_T], expected_T, atol=1e-5)
        first = rows[0].call
        ids = torch.tensor([[*first.prompt_ids, *first.completion_ids]])
        logits = model(input_ids=ids).logits[0, len(first.prompt_ids) - 1 : -1] / (first.temperature or 1)
    probabilities = torch.softmax(logits, -1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    assert torch.allclose(entropies_N[: len(first.completion_ids)], entropies, atol=1e-5)


def test_padding_is_never_read(model: PeftModel, moved: Moved, make_rows: MakeRows) -> None:
    moved(model)
    with torch.no_grad():
        (a, _), (b, _) = (scoring.token_logprobs(model, make_batch(make_rows(), pad_id=pad)) for pad in (0, 17))
    assert torch.equal(a, b)


def test_recomputed_chunks_give_the_same_gradient(
    model: PeftModel, moved: Moved, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(make_rows(), pad_id=0)
    parameters = list(lora.trained_parameters(moved(model)).values())
    whole = torch.autograd.grad(scoring.token_logprobs(model, batch)[0].sum(), parameters)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 64 * 3)
    chunked = torch.autograd.grad(scoring.token_logprobs(model, batch)[0].sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, chunked, strict=True))


def test_a_model_that_changes_its_logits_is_refused(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring.check_head(model, pad_id=0)
    causal_lm: Any = model.get_base_model()
    plain = causal_lm.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        outputs = plain(*args, **kwargs)
        outputs.logits = torch.tanh(outputs.logits)
        return outputs

    monkeypatch.setattr(causal_lm, "forward", capped)
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        scoring.check_head(model, pad_id=0)


def calls_of(rows: list[TrainRow]) -> list[Call]:
    return [row.call for row in rows]


def test_a_fresh_adapter_has_no_kl_to_the_base(model: PeftModel, make_rows: MakeRows) -> None:
    assert kl_to_base(model, 0, calls_of(make_rows()), "default") == 0
    assert kl_to_base(model, 0, calls_of(make_rows()), None) == 0


def test_kl_to_base_equals_a_slow_reference(
    model: PeftModel, moved: Moved, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.add_version(moved(model), "policy-000001", lora.snapshot(model))
    lora.restore(model, {name: torch.zeros_like(t) for name, t in lora.snapshot(model).items()})
    rows = make_rows()
    kls = []
    for call in calls_of(rows):
        ids = torch.tensor([[*call.prompt_ids, *call.completion_ids]])
        predicting = slice(len(call.prompt_ids) - 1, -1)
        with torch.no_grad(), lora.active_adapter(model, "policy-000001"):
            logits_p = model(input_ids=ids).logits[0, predicting]
        with torch.no_grad(), lora.active_adapter(model, None):
            logits_q = model(input_ids=ids).logits[0, predicting]
        kls += full_kl(logits_p, logits_q).tolist()
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 64 * 3)
    measured = kl_to_base(model, 0, calls_of(rows), "policy-000001", microbatch_tokens=40)
    assert measured == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert measured > 0.01
    assert kl_to_base(model, 0, calls_of(rows), "default") == 0
