from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from transformers import Qwen3ForCausalLM

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.model import lora
from fst_optimizer.train import scoring
from fst_optimizer.train import trainer as trainer_module
from fst_optimizer.train.batch import Batch, token_weights
from fst_optimizer.train.losses import LOSSES
from fst_optimizer.train.report import StepReport
from fst_optimizer.train.scoring import kl_to_base
from fst_optimizer.train.trainer import Trainer
from fst_optimizer.types import TrainRow

MakeRows = Callable[..., list[TrainRow]]
MakeModel = Callable[[], PeftModel]
Moved = Callable[[PeftModel], PeftModel]
SlowLogprobs = Callable[[PeftModel, TrainRow], torch.Tensor]


def gradients_of_step(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, model: PeftModel, rows: list[TrainRow]
) -> tuple[dict[str, torch.Tensor], StepReport]:
    """What the optimizer is given."""
    seen: dict[str, torch.Tensor] = {}

    def record(*_: object, **__: object) -> None:
        for name, p in lora.trained_parameters(model).items():
            assert p.grad is not None
            seen[name] = p.grad.clone()

    monkeypatch.setattr(trainer.optimizer, "step", record)
    return seen, trainer.step(rows)


def on_policy(trainer: Trainer, rows: list[TrainRow]) -> list[TrainRow]:
    """The rows with the trainer's own log-probs in the sampler's place."""
    return [
        replace(row, call=replace(row.call, logprobs=tuple(logprobs)))
        for row, logprobs in zip(rows, trainer.logprobs(rows), strict=True)
    ]


def with_logprobs(row: TrainRow, logprobs: torch.Tensor) -> TrainRow:
    return replace(row, call=replace(row.call, logprobs=tuple(logprobs.tolist())))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_logprobs_equal_a_plain_forward_of_each_row(
    model: PeftModel, moved: Moved, make_rows: MakeRows, slow_logprobs: SlowLogprobs, budget: int
) -> None:
    rows = make_rows(9)
    rows.insert(4, make_rows(1, completion_ids=(), logprobs=())[0])
    logprobs = Trainer(moved(model), 0, TrainConfig(microbatch_tokens=budget)).logprobs(rows)
    for row, row_logprobs in zip(rows, logprobs, strict=True):
        with torch.no_grad():
            assert row_logprobs == pytest.approx(slow_logprobs(model, row).tolist(), abs=1e-5)


def test_cispos_step_gradient_equals_a_hand_built_one(
    model: PeftModel, moved: Moved, make_rows: MakeRows, slow_logprobs: SlowLogprobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows()
    trainer = Trainer(moved(model), 0, TrainConfig(ratio_cap=1.5, max_grad_norm=None))
    expected_loss = torch.zeros(())
    tokens = sum(len(row.call.completion_ids) for row in rows)
    for row in rows:
        logprobs_T = slow_logprobs(model, row)
        ratio_T = (logprobs_T.detach() - torch.tensor(row.call.logprobs)).exp().clamp(max=1.5)
        expected_loss = expected_loss - (ratio_T * row.advantage * logprobs_T).sum() / tokens
    parameters = lora.trained_parameters(model)
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values())), strict=True))
    gradients, report = gradients_of_step(monkeypatch, trainer, model, rows)
    assert report.loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("average", ["token", "rollout", "prompt"])
def test_ragged_microbatches_sum_to_the_big_batch(
    make_model: MakeModel,
    moved: Moved,
    make_rows: MakeRows,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    average: str,
) -> None:
    rows = [with_logprobs(row, torch.full((len(row.call.logprobs),), -4.0)) for row in make_rows(9)]
    results = []
    for budget in (8192, 30):
        model = moved(make_model())
        config = TrainConfig(
            loss=loss, average=average, microbatch_tokens=budget, kl_coef=0.1, entropy_coef=0.1, max_grad_norm=None
        )
        results.append(gradients_of_step(monkeypatch, Trainer(model, 0, config), model, rows))
    (whole, whole_report), (split, split_report) = results
    assert all((whole[name] - split[name]).abs().max() <= 1e-6 for name in whole)
    assert (split_report.updated, split_report.reason) == (True, "")
    for field in ("loss", "grad_norm", "ratio_mean", "clipped_share", "entropy", "kl", "advantage_delta", "tokens"):
        assert getattr(split_report, field) == pytest.approx(getattr(whole_report, field), rel=1e-5)


def test_the_rollout_average_reaches_the_loss(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig(average="rollout"))
    rows = on_policy(trainer, make_rows())
    weights = token_weights(rows, "rollout")
    by_hand = sum(-row.advantage * sum(row.call.logprobs) * weight for row, weight in zip(rows, weights, strict=True))
    assert trainer.step(rows).loss == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("budget", [8192, 30])
def test_the_prompt_averages_gradient_is_a_mean_of_group_means(
    model: PeftModel,
    moved: Moved,
    make_rows: MakeRows,
    slow_logprobs: SlowLogprobs,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
) -> None:
    rows = make_rows(9)  # groups of 4, 4 and 1 calls
    config = TrainConfig(
        average="prompt", kl_coef=0.1, ratio_cap=1.5, max_grad_norm=None, microbatch_tokens=budget, lr=1e-3
    )
    trainer = Trainer(moved(model), 0, config)
    group_means = []
    for group in sorted({row.group for row in rows}):
        losses = []
        for row in (row for row in rows if row.group == group):
            with torch.no_grad(), lora.active_adapter(model, None):
                base_T = slow_logprobs(model, row)
            logprobs_T = slow_logprobs(model, row)
            ratio_T = (logprobs_T.detach() - torch.tensor(row.call.logprobs)).exp().clamp(max=1.5)
            kl_T = (base_T - logprobs_T).exp() - 1 - (base_T - logprobs_T)
            losses.append(-ratio_T * row.advantage * logprobs_T + 0.1 * kl_T)
        group_means.append(torch.cat(losses).mean())
    assert len(group_means) == 3
    expected_loss = torch.stack(group_means).mean()
    parameters = lora.trained_parameters(model)
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values())), strict=True))
    gradients, report = gradients_of_step(monkeypatch, trainer, model, rows)
    assert report.loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-5) for name in expected)
    # What is reported stays a mean over tokens: only the loss is averaged by group.
    by_token = Trainer(model, 0, config.changed(average="token"))
    token_report = gradients_of_step(monkeypatch, by_token, model, rows)[1]
    for field in ("entropy", "kl", "ratio_mean", "clipped_share", "advantage_delta", "tokens"):
        assert getattr(report, field) == pytest.approx(getattr(token_report, field), rel=1e-5)
    assert report.loss != pytest.approx(token_report.loss, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("average", ["token", "rollout", "prompt"])
def test_flat_rows_leave_the_policy_gradient_as_it_is_without_them(
    model: PeftModel, moved: Moved, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, loss: str, average: str
) -> None:
    trainer = Trainer(moved(model), 0, TrainConfig(loss=loss, average=average, max_grad_norm=None))
    rows = make_rows(6)
    flat = [
        replace(row, advantage=0.0, rollout=row.rollout + 10, group=row.group + 10, flat=True)
        for row in make_rows(5, seed=3)
    ]
    alone, alone_report = gradients_of_step(monkeypatch, trainer, model, rows)
    mixed, mixed_report = gradients_of_step(monkeypatch, trainer, model, [*flat[:2], *rows, *flat[2:]])
    assert max(gradient.abs().max() for gradient in alone.values()) > 1e-3
    assert all(torch.allclose(alone[name], mixed[name], atol=1e-6) for name in alone)
    assert mixed_report.loss == pytest.approx(alone_report.loss, abs=1e-6)
    assert mixed_report.advantage_delta == pytest.approx(alone_report.advantage_delta, rel=1e-4)
    assert mixed_report.tokens == sum(len(row.call.completion_ids) for row in (*rows, *flat))


def slow_entropies(model: PeftModel, row: TrainRow) -> torch.Tensor:
    """The reference: one row, no padding, all logits, plain autograd."""
    ids = torch.tensor([[*row.call.prompt_ids, *row.call.completion_ids]])
    logits = model(input_ids=ids).logits[0, len(row.call.prompt_ids) - 1 : -1] / (row.call.temperature or 1.0)
    logprobs = torch.log_softmax(logits, -1)
    return -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [2**25, 64 * 3])
@pytest.mark.parametrize("budget", [8192, 30])
def test_the_gradient_of_the_entropy_bonus_equals_a_plain_one(
    model: PeftModel,
    moved: Moved,
    make_rows: MakeRows,
    slow_logprobs: SlowLogprobs,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", chunk)
    config = TrainConfig(entropy_coef=0.3, kl_coef=0.1, max_grad_norm=None, microbatch_tokens=budget)
    trainer = Trainer(moved(model), 0, config)
    rows = [replace(row, flat=row.group == 1, advantage=row.advantage * (row.group != 1)) for row in make_rows(9)]
    tokens = sum(len(row.call.completion_ids) for row in rows)
    with_signal = sum(len(row.call.completion_ids) for row in rows if not row.flat)
    assert 0 < with_signal < tokens
    expected_loss, entropy = torch.zeros(()), 0.0
    for row in rows:
        logprobs_T, entropies_T = slow_logprobs(model, row), slow_entropies(model, row)
        with torch.no_grad(), lora.active_adapter(model, None):
            base_T = slow_logprobs(model, row)
        ratio_T = (logprobs_T.detach() - torch.tensor(row.call.logprobs)).exp().clamp(max=4.0)
        kl_T = (base_T - logprobs_T).exp() - 1 - (base_T - logprobs_T)
        expected_loss = expected_loss - (ratio_T * row.advantage * logprobs_T).sum() / with_signal
        expected_loss = expected_loss + (0.1 * kl_T - 0.3 * entropies_T).sum() / tokens
        entropy += entropies_T.sum().item() / tokens
    parameters = lora.trained_parameters(model)
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values())), strict=True))
    gradients, report = gradients_of_step(monkeypatch, trainer, model, rows)
    assert report.loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert report.entropy == pytest.approx(entropy, rel=1e-5)
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-5) for name in expected)


def test_the_entropy_bonus_makes_answers_vary_and_the_penalty_pulls_back_in_flat_groups(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows
) -> None:
    rows = [replace(row, advantage=0.0, flat=True) for row in make_rows()]

    def after(**values: float) -> list[StepReport]:
        trainer = Trainer(moved(make_model()), 0, TrainConfig(lr=1e-2, warmup_steps=0, **values))  # type: ignore[arg-type]
        return [trainer.step(rows) for _ in range(5)]

    freed, pulled = after(entropy_coef=1.0), after(kl_coef=1.0)
    assert freed[-1].entropy > freed[0].entropy + 0.01
    assert pulled[-1].kl < pulled[0].kl  # type: ignore[operator]
    assert all(report.updated and report.advantage_delta == 0 for report in (*freed, *pulled))


def test_dr_grpos_divisor_is_the_constant_given(make_model: MakeModel, make_rows: MakeRows) -> None:
    losses = [
        Trainer(make_model(), 0, TrainConfig(loss="dr_grpo"), max_completion_tokens=limit).step(make_rows()).loss
        for limit in (16, 32)
    ]
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)


def test_the_report_on_policy(model: PeftModel, moved: Moved, make_rows: MakeRows, slow_logprobs: SlowLogprobs) -> None:
    trainer = Trainer(moved(model), 0, TrainConfig(lr=1e-3, warmup_steps=10))
    rows = on_policy(trainer, make_rows())
    report = trainer.step(rows)
    assert report.updated and report.reason == ""
    assert report.ratio_mean == pytest.approx(1, abs=1e-5)
    assert report.clipped_share == 0
    assert report.advantage_delta == pytest.approx(0, abs=1e-5)
    assert report.tokens == sum(len(row.call.completion_ids) for row in rows)
    assert report.kl is None
    assert 0 < report.entropy < math.log(64)
    assert report.lr == pytest.approx(1e-4)


def test_a_capped_ratio_is_counted(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig())
    # Half of the rows were sampled at log-probs 2 lower than the trainer's: ratio e^2 = 7.4, above 4.
    rows = on_policy(trainer, [make_rows(1)[0]] * 4)
    rows = [with_logprobs(r, torch.tensor(r.call.logprobs) - 2 * (i % 2)) for i, r in enumerate(rows)]
    report = trainer.step(rows)
    assert report.clipped_share == pytest.approx(0.5)
    assert report.ratio_mean == pytest.approx((1 + math.exp(2)) / 2, rel=1e-4)
    assert report.advantage_delta == pytest.approx(rows[0].advantage, rel=1e-4)


def test_good_answers_become_likelier_and_bad_ones_rarer(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig(lr=1e-2, warmup_steps=0))
    good, bad = on_policy(trainer, make_rows(2))
    rows = [replace(good, advantage=1.0), replace(bad, advantage=-1.0)]
    for _ in range(3):
        assert trainer.step(rows).updated
    after = [sum(logprobs) for logprobs in trainer.logprobs(rows)]
    assert after[0] > sum(good.call.logprobs)
    assert after[1] < sum(bad.call.logprobs)
    assert kl_to_base(model, 0, [good.call], "default") > 0


def test_only_the_trained_adapter_changes(model: PeftModel, make_rows: MakeRows) -> None:
    lora.add_version(model, "policy-000001", lora.snapshot(model))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert Trainer(model, 0, TrainConfig()).step(make_rows()).updated
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".default." in name for name in changed)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_warm_up_rises_linearly_then_stays(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig(lr=1.0e-4, warmup_steps=4))
    lrs = [trainer.step(make_rows()).lr for _ in range(6)]
    assert lrs == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])


def test_the_gradient_is_scaled_down_to_its_limit(make_model: MakeModel, moved: Moved, make_rows: MakeRows) -> None:
    rows, norms = make_rows(), []
    for limit in (None, 1e-3):
        model = moved(make_model())
        trainer = Trainer(model, 0, TrainConfig(max_grad_norm=limit, betas=(0.0, 0.999)))
        report = trainer.step(rows)
        # With beta1 = 0, the first moment is the gradient that AdamW was given.
        moments = [t for name, t in trainer.state()["tensors"].items() if name.endswith("exp_avg")]
        norms.append((report.grad_norm, torch.nn.utils.get_total_norm(moments).item()))
    (unclipped, given), (reported, clipped) = norms
    assert given == pytest.approx(unclipped, rel=1e-4)
    assert reported == pytest.approx(unclipped, rel=1e-4) and reported > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_no_rows_means_flat_groups(model: PeftModel) -> None:
    report = Trainer(model, 0, TrainConfig()).step([])
    assert (report.updated, report.reason, report.tokens) == (False, "every group was flat", 0)


def test_cut_completions_are_masked_on_request(make_model: MakeModel, make_rows: MakeRows) -> None:
    whole, cut = make_rows(4), make_rows(3, seed=1, finish_reason="length")
    first, second = make_model(), make_model()
    masked = Trainer(first, 0, TrainConfig(train_truncated=False)).step([*whole, *cut])
    assert masked == Trainer(second, 0, TrainConfig()).step(whole)
    assert equal(lora.snapshot(first), lora.snapshot(second))
    report = Trainer(first, 0, TrainConfig(train_truncated=False)).step(cut)
    assert (report.updated, report.reason) == (False, "every completion was empty or truncated")


def test_a_non_finite_step_changes_nothing(model: PeftModel, make_rows: MakeRows) -> None:
    rows = make_rows()
    trainer = Trainer(model, 0, TrainConfig())
    trainer.step(rows)
    weights, state = lora.snapshot(model), trainer.state()
    report = trainer.step([replace(rows[0], advantage=math.nan), *rows[1:]])
    assert not report.updated
    assert report.reason == "the loss was not finite"
    assert equal(weights, lora.snapshot(model))
    assert equal(state["tensors"], trainer.state()["tensors"])
    assert trainer.state()["numbers"] == {"updates": 1, "bad_steps": 1, "lr_scale": 1.0, "bonus": 0.0}
    assert all(p.grad is None for p in model.parameters())


def test_a_non_finite_gradient_is_told_apart(
    model: PeftModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(math.inf))
    report = Trainer(model, 0, TrainConfig()).step(make_rows())
    assert (report.updated, report.reason) == (False, "the gradient was not finite")


def test_bad_steps_in_a_row_stop_the_run(model: PeftModel, make_rows: MakeRows) -> None:
    good = make_rows()
    bad = [replace(good[0], advantage=math.inf)]
    trainer = Trainer(model, 0, TrainConfig(max_bad_steps=2))
    assert not trainer.step(bad).updated
    assert trainer.step(good).updated
    assert not trainer.step(bad).updated
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.step(bad)


def test_a_saved_state_gives_the_same_next_step_to_the_bit(make_model: MakeModel, make_rows: MakeRows) -> None:
    config = TrainConfig(weight_decay=0.01, warmup_steps=5, kl_coef=0.01)
    model = make_model()
    trainer = Trainer(model, 0, config)
    for seed in range(2):
        trainer.step(make_rows(seed=seed))
    weights, state = lora.snapshot(model), trainer.state()
    tensors = load(save(state["tensors"]))
    numbers = json.loads(json.dumps(state["numbers"]))
    report = trainer.step(make_rows(seed=2))

    resumed_model = make_model()
    lora.restore(resumed_model, weights)
    resumed = Trainer(resumed_model, 0, config)
    resumed.load_state({"tensors": tensors, "numbers": numbers})
    assert resumed.step(make_rows(seed=2)) == report
    assert equal(lora.snapshot(resumed_model), lora.snapshot(model))
    assert equal(resumed.state()["tensors"], trainer.state()["tensors"])


def test_what_dropout_drops_follows_from_the_seed_and_the_update(
    make_base: Callable[[], Any], make_rows: MakeRows
) -> None:
    def after(noise: int, seed: int = 3) -> dict[str, torch.Tensor]:
        model = lora.attach(make_base(), LoraConfig(rank=4, alpha=8, dropout=0.5))
        torch.manual_seed(noise)  # what others in the process draw
        before = torch.get_rng_state()
        trainer = Trainer(model, 0, TrainConfig(), seed=seed)
        trainer.step(make_rows(seed=1))
        trainer.step(make_rows(seed=2))
        assert torch.equal(torch.get_rng_state(), before)
        return lora.snapshot(model)

    assert equal(after(1), after(2))
    assert not equal(after(1), after(1, seed=4))


def test_a_state_is_a_copy(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig())
    trainer.step(make_rows())
    state = trainer.state()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    trainer.step(make_rows())
    assert equal(state["tensors"], before)


def test_a_state_of_another_model_is_refused(model: PeftModel) -> None:
    with pytest.raises(TrainingError, match=r"layers\.9"):
        state: dict[str, Any] = {"tensors": {"layers.9.lora_A.weight.exp_avg": torch.zeros(1)}, "numbers": {}}
        Trainer(model, 0, TrainConfig()).load_state(state)


def test_gradient_checkpointing_gives_the_same_step(make_model: MakeModel, moved: Moved, make_rows: MakeRows) -> None:
    plain, checkpointed = moved(make_model()), moved(make_model())
    Trainer(plain, 0, TrainConfig()).step(make_rows())
    trainer = Trainer(checkpointed, 0, TrainConfig(gradient_checkpointing=True))
    assert checkpointed.is_gradient_checkpointing
    trainer.step(make_rows())
    a, b = lora.snapshot(plain), lora.snapshot(checkpointed)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_kl_penalty_pulls_to_the_base(make_model: MakeModel, moved: Moved, make_rows: MakeRows) -> None:
    model = moved(make_model())
    trainer = Trainer(model, 0, TrainConfig(kl_coef=1.0, lr=1e-2, warmup_steps=0))
    rows = [replace(row, advantage=0.0) for row in make_rows()]
    kls = [trainer.step(rows).kl for _ in range(5)]
    assert all(kl is not None and kl > 0 for kl in kls)
    assert kls[-1] < kls[0]  # type: ignore[operator]
    assert not model.training


def test_a_fresh_adapter_has_no_kl_to_report(model: PeftModel, make_rows: MakeRows) -> None:
    assert Trainer(model, 0, TrainConfig(kl_coef=0.1)).step(make_rows()).kl == pytest.approx(0, abs=1e-6)


def test_a_step_holds_the_lock_once(model: PeftModel, make_rows: MakeRows) -> None:
    lock = threading.Lock()
    trainer = Trainer(model, 0, TrainConfig(), lock=lock)
    assert trainer.step(make_rows()).updated
    trainer.logprobs(make_rows())
    assert not lock.locked()


def test_two_trainers_in_one_process_do_not_disturb_each_other(make_model: MakeModel, make_rows: MakeRows) -> None:
    from accelerate import Accelerator

    alone = make_model()
    Trainer(alone, 0, TrainConfig()).step(make_rows())
    beside = make_model()
    trainer = Trainer(beside, 0, TrainConfig())
    # Another trainer's settings are global to accelerate: none of them may reach ours.
    Accelerator(gradient_accumulation_steps=4).gradient_state._set_sync_gradients(False)
    trainer.step(make_rows())
    assert equal(lora.snapshot(alone), lora.snapshot(beside))


@pytest.mark.parametrize("average", ["token", "prompt"])
def test_the_shares_of_two_processes_sum_to_the_whole(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    rows, config = (
        make_rows(9),
        TrainConfig(microbatch_tokens=40, max_grad_norm=None, average=average, kl_coef=0.1, entropy_coef=0.1),
    )
    model = moved(make_model())
    whole, whole_report = gradients_of_step(monkeypatch, Trainer(model, 0, config), model, rows)
    # Instead of summing over processes, keep each one's share and sum here.
    monkeypatch.setattr(trainer_module, "reduce", lambda tensor, reduction: tensor)
    shares = []
    for rank in range(2):
        trainer = Trainer(model, 0, config)
        monkeypatch.setattr(trainer, "processes", SimpleNamespace(process_index=rank, num_processes=2))
        shares.append(gradients_of_step(monkeypatch, trainer, model, rows))
    (first, first_report), (second, second_report) = shares
    assert all((first[name] + second[name] - whole[name]).abs().max() <= 1e-6 for name in whole)
    assert first_report.loss + second_report.loss == pytest.approx(whole_report.loss, rel=1e-5)
    assert first_report.entropy + second_report.entropy == pytest.approx(whole_report.entropy, rel=1e-5)


def test_a_process_without_a_microbatch_takes_part(
    model: PeftModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "reduce", lambda tensor, reduction: tensor)
    trainer = Trainer(model, 0, TrainConfig())
    monkeypatch.setattr(trainer, "processes", SimpleNamespace(process_index=1, num_processes=2))
    gradients, report = gradients_of_step(monkeypatch, trainer, model, make_rows(1))
    assert report.loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_bf16_model_trains_float32_adapters(
    make_base: Callable[[], Qwen3ForCausalLM], make_rows: MakeRows, slow_logprobs: SlowLogprobs
) -> None:
    base: Any = make_base()
    model = lora.attach(base.to(torch.bfloat16), LoraConfig(rank=4, alpha=8))
    trainer = Trainer(model, 0, TrainConfig())
    rows = make_rows(temperature=1.0)
    for row, logprobs in zip(rows, trainer.logprobs(rows), strict=True):
        with torch.no_grad():
            assert logprobs == pytest.approx(slow_logprobs(model, row).tolist(), abs=0.1)
    assert trainer.step(rows).updated
    assert {tensor.dtype for tensor in lora.snapshot(model).values()} == {torch.float32}


class Small:
    """A device that holds only so many padded tokens at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, error: RuntimeError) -> None:
        self.passes: list[int] = []
        accumulate = Trainer._accumulate

        def limited(trainer: Trainer, batch: Batch) -> torch.Tensor:
            size = batch.input_ids_BT.numel()
            self.passes.append(size)
            if size > tokens:
                raise error
            return accumulate(trainer, batch)

        monkeypatch.setattr(Trainer, "_accumulate", limited)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_step_that_does_not_fit_into_memory_is_taken_in_smaller_parts(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    rows, whole, parts = make_rows(12), make_model(), make_model()
    expected = Trainer(whole, 0, TrainConfig(microbatch_tokens=200)).step(rows)
    device = Small(monkeypatch, 60, error)
    trainer = Trainer(parts, 0, TrainConfig(microbatch_tokens=200))
    found = trainer.step(rows)
    assert found.updated and found.loss == pytest.approx(expected.loss, abs=1e-6)
    for one, other in zip(lora.snapshot(whole).values(), lora.snapshot(parts).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    failures = sum(size > 60 for size in device.passes)
    assert failures == 2  # 200, 100, and 50 fits
    trainer.step(rows)
    assert sum(size > 60 for size in device.passes) == failures  # the smaller size stays


def test_a_row_that_does_not_fit_alone_stops_with_what_to_do(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    before = lora.snapshot(model)
    Small(monkeypatch, 1, OUT_OF_MEMORY[0])
    with pytest.raises(TrainingError, match=r"out of memory on \d+ tokens.*gradient_checkpointing"):
        Trainer(model, 0, TrainConfig()).step(make_rows())
    assert all(torch.equal(before[name], tensor) for name, tensor in lora.snapshot(model).items())


def test_another_error_of_the_device_is_not_taken_for_a_lack_of_memory(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Small(monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        Trainer(make_model(), 0, TrainConfig()).step(make_rows())
    assert len(device.passes) == 1
