"""Several updates from one batch, steps held to a target KL, and the entropy floor: the trainer's own part of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import TrainingError
from fst_optimizer.model import lora
from fst_optimizer.train import pace as pace_module
from fst_optimizer.train import trainer as trainer_module
from fst_optimizer.train.report import StepReport
from fst_optimizer.train.trainer import Trainer
from fst_optimizer.types import TrainRow

MakeRows = Callable[..., list[TrainRow]]
MakeModel = Callable[[], PeftModel]
Moved = Callable[[PeftModel], PeftModel]
SlowLogprobs = Callable[[PeftModel, TrainRow], torch.Tensor]
Tensors = dict[str, torch.Tensor]

FAST = {"lr": 1e-2, "warmup_steps": 0}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sampled_by(trainer: Trainer, rows: list[TrainRow]) -> list[TrainRow]:
    """The rows with the log-probs of this trainer's weights, as if they had been sampled from them."""
    return [
        replace(row, call=replace(row.call, logprobs=tuple(logprobs)))
        for row, logprobs in zip(rows, trainer.logprobs(rows), strict=True)
    ]


def watched(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, model: PeftModel) -> list[tuple[Tensors, Tensors]]:
    """Of every update of the optimizer: the weights before it, and the gradient that it was given."""
    seen: list[tuple[Tensors, Tensors]] = []
    update = trainer.optimizer.step

    def record() -> None:
        gradients = {n: p.grad.clone() for n, p in lora.trained_parameters(model).items() if p.grad is not None}
        seen.append((lora.snapshot(model), gradients))
        update()

    monkeypatch.setattr(trainer.optimizer, "step", record)
    return seen


# -- epochs -----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_step_as_it_was_before_there_were_epochs(
    model: PeftModel, moved: Moved, make_rows: MakeRows
) -> None:
    """Numbers of the code before epochs, target KL and floor, where the weights were the same to the bit."""
    config = TrainConfig(kl_coef=0.01, entropy_coef=0.01, ratio_cap=1.5, warmup_steps=3, weight_decay=0.01)
    trainer = Trainer(moved(model), 0, config)
    reports = [trainer.step(make_rows(seed=seed)) for seed in range(3)]
    assert [report.loss for report in reports] == pytest.approx([-0.4404834, -1.3232462, 0.3778793], abs=1e-6)
    assert [report.grad_norm for report in reports] == pytest.approx([3.784696, 2.321981, 2.882930], abs=1e-5)
    assert [report.lr for report in reports] == [1e-3 / 3, 1e-3 * 2 / 3, 1e-3]
    assert sum(float(tensor.double().abs().sum()) for tensor in lora.snapshot(model).values()) == pytest.approx(
        324.80859986, abs=1e-5
    )


def test_every_epochs_gradient_equals_a_slow_one_against_the_samplers_log_probs(
    make_model: MakeModel,
    moved: Moved,
    make_rows: MakeRows,
    slow_logprobs: SlowLogprobs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, reference = moved(make_model()), make_model()
    config = TrainConfig(epochs=3, ratio_cap=1.5, max_grad_norm=None, microbatch_tokens=40, lr=3e-2, warmup_steps=0)
    trainer = Trainer(model, 0, config)
    rows = sampled_by(trainer, make_rows(9, temperature=1.0))
    seen = watched(monkeypatch, trainer, model)
    report = trainer.step(rows)
    assert (len(seen), report.epochs, report.updated) == (3, 3, True)
    tokens = sum(len(row.call.completion_ids) for row in rows)
    parameters = lora.trained_parameters(reference)
    for weights, gradients in seen:
        lora.restore(reference, weights)
        loss, ratios, capped = torch.zeros(()), [], 0
        for row in rows:
            logprobs_T = slow_logprobs(reference, row)
            ratio_T = (logprobs_T.detach() - torch.tensor(row.call.logprobs)).exp()
            ratios += ratio_T.tolist()
            capped += int((ratio_T > 1.5).sum())
            loss = loss - (ratio_T.clamp(max=1.5) * row.advantage * logprobs_T).sum() / tokens
        expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        assert all(torch.allclose(gradients[name], expected[name], atol=1e-5) for name in expected)
    # What is reported is of the last epoch.
    assert report.loss == pytest.approx(loss.item(), abs=1e-5)
    assert report.ratio_max == pytest.approx(max(ratios), rel=1e-4) and report.ratio_max > 1.5
    assert report.ratio_mean == pytest.approx(sum(ratios) / tokens, rel=1e-4)
    assert report.clipped_share == pytest.approx(capped / tokens) and capped
    assert report.tokens == tokens


def test_two_epochs_are_two_steps_on_the_same_rows_but_for_warm_up_and_count(
    make_model: MakeModel, make_rows: MakeRows
) -> None:
    rows = make_rows()
    once, twice = make_model(), make_model()
    two_steps = Trainer(once, 0, TrainConfig(warmup_steps=0))
    two_steps.step(rows)
    two_steps.step(rows)
    one_step = Trainer(twice, 0, TrainConfig(warmup_steps=0, epochs=2))
    one_step.step(rows)
    assert equal(lora.snapshot(once), lora.snapshot(twice))
    assert (two_steps.state()["numbers"]["updates"], one_step.state()["numbers"]["updates"]) == (2, 1)


def test_the_warm_up_counts_batches_not_updates(model: PeftModel, make_rows: MakeRows) -> None:
    trainer = Trainer(model, 0, TrainConfig(lr=1e-4, warmup_steps=4, epochs=3))
    assert [trainer.step(make_rows()).lr for _ in range(5)] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4])


def test_dropout_drops_something_else_in_each_epoch(make_base: Callable[[], Any], make_rows: MakeRows) -> None:
    model = lora.attach(make_base(), LoraConfig(rank=4, alpha=8, dropout=0.5))
    moved = {name: tensor + 0.1 for name, tensor in lora.snapshot(model).items()}
    lora.restore(model, moved)
    losses = []
    for epochs in (1, 2):
        lora.restore(model, moved)
        losses.append(Trainer(model, 0, TrainConfig(lr=1e-30, epochs=epochs)).step(make_rows()).loss)
    assert losses[0] != losses[1]


class Breaking:
    """A trainer whose gradient is not finite in one epoch of every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: Trainer, epoch: int) -> None:
        self.epoch, self.broken = 0, epoch
        gradient = trainer._gradient

        def broken(rows: list[TrainRow]) -> StepReport:
            self.epoch += 1
            found = gradient(rows)
            return replace(found, loss=math.nan) if self.epoch % 3 == self.broken else found

        monkeypatch.setattr(trainer, "_gradient", broken)


def test_an_epoch_that_is_not_finite_ends_the_step_and_leaves_what_was_learned(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, whole, broken = make_rows(), make_model(), make_model()
    Trainer(whole, 0, TrainConfig(epochs=2)).step(rows)
    trainer = Trainer(broken, 0, TrainConfig(epochs=4))
    Breaking(monkeypatch, trainer, epoch=0)  # the third
    report = trainer.step(rows)
    assert (report.updated, report.epochs) == (True, 2)
    assert report.reason == "epoch 3 was left out: the loss was not finite"
    assert math.isfinite(report.loss)
    assert equal(lora.snapshot(whole), lora.snapshot(broken))
    assert trainer.state()["numbers"] == {"updates": 1, "bad_steps": 1, "lr_scale": 1.0, "bonus": 0.0}


def test_steps_that_break_off_in_a_row_stop_the_run(
    model: PeftModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(model, 0, TrainConfig(epochs=4, max_bad_steps=2))
    Breaking(monkeypatch, trainer, epoch=0)
    assert trainer.step(make_rows()).updated
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.step(make_rows())


# -- the target KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_target_that_no_step_reaches_is_the_plain_step(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows, epochs: int
) -> None:
    plain, held = moved(make_model()), moved(make_model())
    without = Trainer(plain, 0, TrainConfig(epochs=epochs))
    with_target = Trainer(held, 0, TrainConfig(epochs=epochs, target_kl=100.0))
    for seed in range(3):
        rows = make_rows(seed=seed)
        report = with_target.step(rows)
        assert replace(report, kl_to_last=None) == without.step(rows)
        assert report.kl_to_last is not None and 0 < report.kl_to_last < 1
    assert equal(lora.snapshot(plain), lora.snapshot(held))
    assert with_target.state()["numbers"]["lr_scale"] == 1.0


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_step_is_shortened_to_the_target_and_the_next_begins_there(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows, slow_logprobs: SlowLogprobs, epochs: int
) -> None:
    plain, held = moved(make_model()), moved(make_model())
    start, rows = lora.snapshot(held), make_rows(9, temperature=1.0)
    Trainer(plain, 0, TrainConfig(epochs=epochs, **FAST)).step(rows)  # type: ignore[arg-type]
    trainer = Trainer(held, 0, TrainConfig(epochs=epochs, target_kl=1e-3, **FAST))  # type: ignore[arg-type]
    report = trainer.step(rows)
    assert report.kl_to_last == pytest.approx(1e-3, rel=0.5)
    share = report.lr / 1e-2
    assert 0 < share < 0.9
    end = lora.snapshot(plain)
    for name, tensor in lora.snapshot(held).items():
        assert torch.allclose(tensor, start[name] + share * (end[name] - start[name]), atol=1e-6)
    # By hand: k3 of the weights before to those after, on the batch's tokens.
    kls = []
    for row in rows:
        with torch.no_grad():
            after_T = slow_logprobs(held, row)
            now = lora.snapshot(held)
            lora.restore(held, start)
            log_ratio_T = after_T - slow_logprobs(held, row)
            lora.restore(held, now)
        kls += (log_ratio_T.exp() - 1 - log_ratio_T).tolist()
    assert report.kl_to_last == pytest.approx(sum(kls) / len(kls), rel=1e-2)
    again = trainer.step(rows)
    assert again.lr < 2 * share * 1e-2
    assert again.kl_to_last is not None and again.kl_to_last <= 1.5e-3


def test_a_rate_that_was_held_back_comes_back_by_doubling(model: PeftModel, moved: Moved, make_rows: MakeRows) -> None:
    trainer = Trainer(moved(model), 0, TrainConfig(lr=1e-3, warmup_steps=0, target_kl=100.0))
    trainer.load_state({"tensors": {}, "numbers": {"lr_scale": 0.25}})
    assert [trainer.step(make_rows()).lr for _ in range(4)] == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


def test_steps_stay_near_their_target(model: PeftModel, moved: Moved, make_rows: MakeRows) -> None:
    trainer = Trainer(moved(model), 0, TrainConfig(target_kl=1e-3, lr=5e-2, warmup_steps=0))
    kls = [trainer.step(make_rows(seed=seed)).kl_to_last or 0.0 for seed in range(10)]
    assert max(kls) <= 1.5e-3
    assert sum(kls) / len(kls) > 0.4e-3


def test_a_step_whose_kl_is_no_number_changes_nothing(
    model: PeftModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(model, 0, TrainConfig(target_kl=0.01, max_bad_steps=2))
    before = lora.snapshot(model)
    monkeypatch.setattr(trainer, "_kl_since", lambda *_: math.nan)
    report = trainer.step(make_rows())
    assert (report.updated, report.epochs) == (False, 0)
    assert report.reason == "the KL to the version before was not finite"
    assert equal(before, lora.snapshot(model))
    assert trainer.state()["numbers"] == {"updates": 0, "bad_steps": 1, "lr_scale": 1.0, "bonus": 0.0}
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.step(make_rows())


def test_the_kl_of_two_processes_is_that_of_one(
    model: PeftModel, moved: Moved, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(9)
    trainer = Trainer(moved(model), 0, TrainConfig())
    earlier = lora.snapshot(model)
    later = {name: 1.1 * tensor for name, tensor in earlier.items()}

    def kl() -> float:
        lora.restore(model, earlier)
        before = trainer._share_of_logprobs(rows)
        lora.restore(model, later)
        return trainer._kl_since(before, rows)

    whole = kl()
    # Instead of summing over processes, keep each one's share and sum here.
    monkeypatch.setattr(trainer_module, "reduce", lambda tensor, reduction: tensor)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(trainer, "processes", SimpleNamespace(process_index=rank, num_processes=2))
        shares.append(kl())
    assert whole > 1e-4 and all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(whole, rel=1e-4)


def test_a_target_adds_no_second_model(model: PeftModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model, 0, TrainConfig(target_kl=1e-6, epochs=2, **FAST))  # type: ignore[arg-type]
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    values = {name: p.clone() for name, p in base.items()}
    kept: list[int] = []

    def counted(one: PeftModel) -> Tensors:
        tensors = lora.snapshot(one)
        kept.append(sum(tensor.numel() for tensor in tensors.values()))
        return tensors

    for module in (trainer_module, pace_module):
        monkeypatch.setattr(module, "snapshot", counted)
    trainer.step(make_rows())
    # The adapter's own size, before and after the step.
    assert kept == [sum(p.numel() for p in lora.trained_parameters(model).values())] * 2
    after = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(after[name] is base[name] and torch.equal(after[name], values[name]) for name in values)
    assert list(model.peft_config) == [lora.TRAINED]


# -- the entropy floor ------------------------------------------------------------------------------------------------


def flat(rows: list[TrainRow]) -> list[TrainRow]:
    return [replace(row, advantage=0.0, group=row.group + 10, rollout=row.rollout + 10, flat=True) for row in rows]


def test_above_the_floor_the_step_is_the_plain_one_and_flat_groups_are_left_out(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows
) -> None:
    plain, floored = moved(make_model()), moved(make_model())
    without, trainer = Trainer(plain, 0, TrainConfig()), Trainer(floored, 0, TrainConfig(entropy_floor=0.1))
    for seed in range(3):
        rows = make_rows(seed=seed)  # log-probs from -6 to -2: 4 nats a token
        assert trainer.step([*rows[:2], *flat(make_rows(4)), *rows[2:]]) == without.step(rows)
    assert equal(lora.snapshot(plain), lora.snapshot(floored))
    assert trainer.step(flat(make_rows())).reason == "every group was flat"


def test_below_the_floor_a_bonus_is_on_and_grows_with_each_step(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows
) -> None:
    constant, floored = moved(make_model()), moved(make_model())
    rows = [*make_rows(5), *flat(make_rows(3, seed=4))]
    with_constant = Trainer(constant, 0, TrainConfig(entropy_coef=0.301))
    trainer = Trainer(floored, 0, TrainConfig(entropy_floor=5.0, entropy_coef=0.3))
    first = trainer.step(rows)
    assert first.entropy_coef == pytest.approx(0.301)
    assert first == with_constant.step(rows)
    assert equal(lora.snapshot(constant), lora.snapshot(floored))
    assert [trainer.step(rows).entropy_coef for _ in range(2)] == pytest.approx([0.3 + 0.00125, 0.3 + 0.0015625])


def test_a_bonus_that_fades_above_the_floor_is_where_it_was_when_it_is_needed_again(
    model: PeftModel, make_rows: MakeRows
) -> None:
    trainer = Trainer(model, 0, TrainConfig(entropy_floor=1.0))
    high = make_rows()
    low = [replace(row, call=replace(row.call, logprobs=(-0.5,) * len(row.call.logprobs))) for row in high]
    weights = [trainer.step(rows).entropy_coef for rows in (low, low, low, high, low, high, high, high, high, low)]
    grown = 0.001 * 1.25**2
    assert weights == pytest.approx([0.001, 0.00125, grown, 0, grown, 0, 0, 0, 0, 0.001])


def test_with_a_floor_a_collapsed_policy_gets_its_entropy_back_from_flat_groups(
    make_model: MakeModel, moved: Moved, make_rows: MakeRows
) -> None:
    def entropies(**values: float) -> list[float]:
        model = moved(make_model())
        trainer = Trainer(model, 0, TrainConfig(**FAST, **values))  # type: ignore[arg-type]
        rows = flat(sampled_by(trainer, make_rows(temperature=1.0)))
        reports = [trainer.step(sampled_by(trainer, rows)) for _ in range(12)]
        return [report.entropy for report in reports]

    below = entropies(entropy_floor=10.0)
    assert below[-1] > below[0] + 0.05
    assert entropies(entropy_floor=0.01) == [0.0] * 12  # nothing is trained on


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_saved_state_goes_on_with_the_same_pace(make_model: MakeModel, moved: Moved, make_rows: MakeRows) -> None:
    config = TrainConfig(epochs=2, target_kl=1e-3, entropy_floor=5.0, **FAST)  # type: ignore[arg-type]
    model = moved(make_model())
    trainer = Trainer(model, 0, config)
    for seed in range(3):
        trainer.step(make_rows(seed=seed))
    weights, state = lora.snapshot(model), trainer.state()
    assert state["numbers"]["lr_scale"] < 1 and state["numbers"]["bonus"] == pytest.approx(0.001 * 1.25**2)
    tensors, numbers = load(save(state["tensors"])), json.loads(json.dumps(state["numbers"]))
    reports = [trainer.step(make_rows(seed=seed)) for seed in (3, 4)]

    resumed_model = make_model()
    lora.restore(resumed_model, weights)
    resumed = Trainer(resumed_model, 0, config)
    resumed.load_state({"tensors": tensors, "numbers": numbers})
    assert [resumed.step(make_rows(seed=seed)) for seed in (3, 4)] == reports
    assert equal(lora.snapshot(resumed_model), lora.snapshot(model))


def test_a_state_from_before_there_was_a_pace_begins_with_the_whole_rate(
    make_model: MakeModel, make_rows: MakeRows
) -> None:
    trainer = Trainer(make_model(), 0, TrainConfig(target_kl=1.0, entropy_floor=0.1))
    trainer.load_state({"tensors": {}, "numbers": {"updates": 3, "bad_steps": 1}})
    assert trainer.state()["numbers"] == {"updates": 3, "bad_steps": 1, "lr_scale": 1.0, "bonus": 0.0}
