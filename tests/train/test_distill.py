from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.model import lora
from fst_optimizer.train import scoring
from fst_optimizer.train.distill import Distiller
from fst_optimizer.train.losses import full_kl, sampled_kl
from fst_optimizer.types import TrainRow

MakeRows = Callable[..., list[TrainRow]]
MakeModel = Callable[[], PeftModel]
Moved = Callable[[PeftModel], PeftModel]
PLAIN = TrainConfig(lr=0.01, warmup_steps=0, max_grad_norm=None)


def taught(rows: list[TrainRow], seed: int = 9) -> list[TrainRow]:
    """The rows, each with another prompt of another length for the teacher."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(1, 64) for _ in range(rng.randrange(1, 15))) for _ in rows]
    return [replace(row, call=replace(row.call, teacher_ids=ids)) for row, ids in zip(rows, prompts, strict=True)]


def teacher_of(model: PeftModel) -> dict[str, Tensor]:
    """A version that the model is not at."""
    generator = torch.Generator().manual_seed(11)
    return {name: one + 0.2 * torch.randn(one.shape, generator=generator) for name, one in lora.snapshot(model).items()}


def slow_logits(model: PeftModel, prompt: tuple[int, ...], row: TrainRow) -> Tensor:
    """The reference: one row, no padding, the logits at its completion tokens. Shape: (T, V)."""
    ids = torch.tensor([[*prompt, *row.call.completion_ids]])
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits / (row.call.temperature or 1.0)


def slow_gradient(
    model: PeftModel, rows: list[TrainRow], teacher: dict[str, Tensor] | None, full: bool
) -> tuple[float, dict[str, Tensor]]:
    """The mean KL and its gradient, or the sampled tokens' estimate of both, in plain torch."""
    own = lora.snapshot(model)
    lora.restore(model, lora.zeroed(model) if teacher is None else teacher)
    with torch.no_grad():
        theirs = [torch.log_softmax(slow_logits(model, row.call.teacher_ids, row), -1) for row in rows]
    lora.restore(model, own)
    total, loss, tokens = 0.0, torch.zeros(()), sum(len(row.call.completion_ids) for row in rows)
    for row, other_TV in zip(rows, theirs, strict=True):
        own_TV = torch.log_softmax(slow_logits(model, row.call.prompt_ids, row), -1)
        if full:
            kl_T = (own_TV.exp() * (own_TV - other_TV)).sum(-1)
            loss, total = loss + kl_T.sum(), total + float(kl_T.sum())
        else:
            ids_T1 = torch.tensor(row.call.completion_ids)[:, None]
            own_T, other_T = own_TV.gather(-1, ids_T1), other_TV.gather(-1, ids_T1)
            estimate_T = (own_T - other_T).detach()
            loss, total = loss + (estimate_T * own_T).sum(), total + float(estimate_T.sum())
    parameters = lora.trained_parameters(model)
    gradients = torch.autograd.grad(loss / tokens, list(parameters.values()))
    return total / tokens, dict(zip(parameters, gradients, strict=True))


def step_gradient(
    monkeypatch: pytest.MonkeyPatch, distiller: Distiller, model: PeftModel, rows: list[TrainRow]
) -> tuple[float, dict[str, Tensor]]:
    """What a step reports and gives the optimizer."""
    seen: dict[str, Tensor] = {}

    def record() -> None:
        for name, parameter in lora.trained_parameters(model).items():
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()

    monkeypatch.setattr(distiller.optimizer, "step", record)
    report = distiller.step(rows)
    assert report.updated
    return report.loss, seen


def test_the_estimate_is_the_ratio_and_its_loss_has_the_gradient_of_the_kl() -> None:
    # log pi = -1, log pi_teacher = -3: the estimate is 2, the loss 2 * -1, its gradient in log pi 2.
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss_N, kl_N = sampled_kl(logprobs_N, torch.tensor([-3.0, -1.5]))
    assert kl_N.tolist() == [2.0, -0.5] and loss_N.tolist() == [-2.0, 1.0]
    torch.autograd.backward(loss_N.sum())
    assert logprobs_N.grad is not None and logprobs_N.grad.tolist() == [2.0, -0.5]


def test_the_sampled_tokens_have_the_gradient_of_the_kl_in_the_mean() -> None:
    # Over all tokens, each as often as pi has it: the mean of the sampled loss's gradient is that of the full KL.
    torch.manual_seed(0)
    logits_V, teacher_V = torch.randn(6, requires_grad=True), torch.randn(6)
    (exact,) = torch.autograd.grad(full_kl(logits_V, teacher_V), logits_V)
    logprobs_V = torch.log_softmax(logits_V, -1)
    loss_V, kl_V = sampled_kl(logprobs_V, torch.log_softmax(teacher_V, -1))
    chances_V = logprobs_V.detach().exp()
    (mean,) = torch.autograd.grad((chances_V * loss_V).sum(), logits_V)
    assert torch.allclose(mean, exact, atol=1e-6)
    assert float((chances_V * kl_V).sum()) == pytest.approx(float(full_kl(logits_V.detach(), teacher_V)), abs=1e-6)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("chunk", [2**25, 64 * 5])  # one chunk, and five tokens a chunk
def test_the_gradient_is_that_of_a_slow_reference(
    monkeypatch: pytest.MonkeyPatch,
    make_model: MakeModel,
    moved: Moved,
    make_rows: MakeRows,
    full: bool,
    base: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", chunk)
    model, rows = moved(make_model()), taught(make_rows())
    teacher = None if base else teacher_of(model)
    wanted, gradients = slow_gradient(model, rows, teacher, full)
    # Microbatches of two rows or so: they add up to the batch.
    distiller = Distiller(model, 0, PLAIN.changed(microbatch_tokens=40), teacher, full=full)
    found, seen = step_gradient(monkeypatch, distiller, model, rows)
    assert found == pytest.approx(wanted, abs=1e-5) and (not full or found > 0.01)
    assert seen.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(seen[name], gradient, atol=1e-6, rtol=1e-4), name
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())


def test_under_the_same_prompt_there_is_nothing_to_learn(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model()
    rows = [replace(row, call=replace(row.call, teacher_ids=row.call.prompt_ids)) for row in make_rows()]
    report = Distiller(model, 0, PLAIN, lora.snapshot(model)).step(rows)
    assert report.loss == pytest.approx(0, abs=1e-6) and report.grad_norm == pytest.approx(0, abs=1e-5)
    assert report.entropy > 1 and report.ratio_mean == 1


@pytest.mark.parametrize("full", [True, False])
def test_steps_bring_the_student_to_the_teacher(
    make_model: MakeModel, make_rows: MakeRows, moved: Moved, full: bool
) -> None:
    model = make_model()
    before = {name: one.clone() for name, one in model.state_dict().items() if "lora" not in name}
    teacher, rows = lora.snapshot(moved(make_model())), taught(make_rows(12, temperature=1.0))
    distiller = Distiller(model, 0, PLAIN, teacher, full=full)
    # On tokens that stay, only the exact KL must fall; the estimate's falls where those tokens get less likely.
    losses = [distiller.step(rows).loss for _ in range(20)]
    assert losses[-1] < losses[0] * (0.5 if full else 1.0)
    assert set(model.peft_config) == {"default"}
    after = model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_a_step_without_memory_goes_on_by_the_sampled_tokens(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, make_rows: MakeRows, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    rows = taught(make_rows(3))
    distiller = Distiller(model, 0, PLAIN, None)
    learn = Distiller._learn

    def hungry(self: Distiller, *given: object) -> Tensor:
        if self.full:
            raise torch.OutOfMemoryError("no more")
        return learn(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Distiller, "_learn", hungry)
    assert distiller.step(rows).updated and not distiller.full
    assert "going on with distill.full_vocabulary=false" in caplog.text
    monkeypatch.setattr(Distiller, "_learn", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    with pytest.raises(TrainingError, match="ran out of memory"):
        distiller.step(rows)
