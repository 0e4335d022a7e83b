from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.train.losses import LOSSES, cispo, full_kl, grpo, kl_estimate, token_entropy

# Two rows of three tokens. Ratios pi_train / pi_sampler: 1, 1/2, 8 and 2, 1, 1.1.
RATIOS_BT = torch.tensor([[1.0, 0.5, 8.0], [2.0, 1.0, 1.1]])
LOGPROBS_BT = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]])
OLD_BT = LOGPROBS_BT - RATIOS_BT.log()
ADVANTAGES_B = torch.tensor([2.0, -1.0])


def approx(values: list[list[float]]) -> object:
    return pytest.approx(torch.tensor(values), abs=1e-5)


def test_cispo_caps_the_weight_of_the_log_prob() -> None:
    loss_BT, ratio_BT, clipped_BT = cispo(LOGPROBS_BT, OLD_BT, ADVANTAGES_B, ratio_cap=4.0)
    # -min(r, 4) * A * logp. Row 0, A = 2: -(1)(2)(-1), -(.5)(2)(-2), -(4)(2)(-3).
    # Row 1, A = -1: -(2)(-1)(-.5), -(1)(-1)(-1.5), -(1.1)(-1)(-2.5).
    assert loss_BT == approx([[2.0, 2.0, 24.0], [-1.0, -1.5, -2.75]])
    assert ratio_BT == approx(RATIOS_BT.tolist())
    assert clipped_BT.tolist() == [[False, False, True], [False, False, False]]


def test_grpo_takes_the_worse_of_ratio_and_clipped_ratio() -> None:
    loss_BT, ratio_BT, clipped_BT = grpo(LOGPROBS_BT, OLD_BT, ADVANTAGES_B, clip_low=0.2, clip_high=0.3)
    # -min(rA, clip(r, .8, 1.3)A). Row 0, A = 2: -min(2, 2), -min(1, 1.6), -min(16, 2.6).
    # Row 1, A = -1: -min(-2, -1.3), -min(-1, -1), -min(-1.1, -1.1).
    assert loss_BT == approx([[-2.0, -1.0, -2.6], [2.0, 1.0, 1.1]])
    assert ratio_BT == approx(RATIOS_BT.tolist())
    assert clipped_BT.tolist() == [[False, False, True], [False, False, False]]


def test_grpo_clips_low_ratios_of_bad_answers() -> None:
    # A = -1, r = 1/2: -min(-.5, -.8) = .8, and the gradient is gone.
    logprobs_BT = torch.tensor([[-2.0]], requires_grad=True)
    loss_BT, _, clipped_BT = grpo(logprobs_BT, torch.tensor([[-2.0 + math.log(2)]]), torch.tensor([-1.0]))
    torch.autograd.backward(loss_BT.sum())
    assert loss_BT.item() == pytest.approx(0.8)
    assert clipped_BT.item()
    assert logprobs_BT.grad is not None and logprobs_BT.grad.item() == 0


def test_dr_grpo_clips_as_grpo_does() -> None:
    loss_BT, ratio_BT, clipped_BT = LOSSES["dr_grpo"](LOGPROBS_BT, OLD_BT, ADVANTAGES_B, clip_low=0.6, clip_high=0.05)
    # -min(rA, clip(r, .4, 1.05)A). Row 0, A = 2: -min(2, 2), -min(1, 1), -min(16, 2.1).
    # Row 1, A = -1: -min(-2, -1.05), -min(-1, -1), -min(-1.1, -1.05).
    assert loss_BT == approx([[-2.0, -1.0, -2.1], [2.0, 1.0, 1.1]])
    assert ratio_BT == approx(RATIOS_BT.tolist())
    assert clipped_BT.tolist() == [[False, False, True], [False, False, False]]


def test_cispos_gradient_is_the_capped_weighted_score() -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 3, 5, requires_grad=True)
    ids_BT = torch.tensor([[0, 1, 2], [3, 4, 0]])
    logprobs_BT = torch.log_softmax(logits_BTV, -1).gather(-1, ids_BT[..., None])[..., 0]
    old_BT = (logprobs_BT - RATIOS_BT.log()).detach()
    torch.autograd.backward(cispo(logprobs_BT, old_BT, ADVANTAGES_B, ratio_cap=4.0)[0].sum())
    # d log pi(y) / d logits = onehot(y) - pi, times -min(r, 4) * A.
    weight_BT1 = (-RATIOS_BT.clamp(max=4.0) * ADVANTAGES_B[:, None])[..., None]
    score_BTV = torch.nn.functional.one_hot(ids_BT, 5) - torch.softmax(logits_BTV.detach(), -1)
    assert logits_BTV.grad is not None
    assert torch.allclose(logits_BTV.grad, weight_BT1 * score_BTV, atol=1e-5)


def test_every_loss_that_can_be_set_is_there() -> None:
    assert get_args(TrainConfig.model_fields["loss"].annotation) == tuple(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_is_one_finite_number_a_token(self, name: str) -> None:
        far_BT = torch.tensor([[-500.0, 0.0, -1.0], [0.0, -500.0, -1.0]])
        for part in LOSSES[name](far_BT, far_BT.flip(1), ADVANTAGES_B):
            assert part.shape == (2, 3)
            assert part.float().isfinite().all()

    def test_on_policy_gradient_is_minus_the_advantage(self, name: str) -> None:
        logprobs_BT = LOGPROBS_BT.clone().requires_grad_()
        loss_BT, ratio_BT, clipped_BT = LOSSES[name](logprobs_BT, LOGPROBS_BT, ADVANTAGES_B)
        torch.autograd.backward(loss_BT.sum())
        assert logprobs_BT.grad == approx([[-2.0] * 3, [1.0] * 3])
        assert torch.equal(ratio_BT, torch.ones(2, 3))
        assert not ratio_BT.requires_grad
        assert not clipped_BT.any()

    def test_zero_advantage_is_zero_gradient(self, name: str) -> None:
        logprobs_BT = LOGPROBS_BT.clone().requires_grad_()
        torch.autograd.backward(LOSSES[name](logprobs_BT, OLD_BT, torch.zeros(2))[0].sum())
        assert torch.equal(logprobs_BT.grad, torch.zeros(2, 3))  # type: ignore[arg-type]


def test_kl_estimate_by_hand() -> None:
    # r = pi_base / pi = 2: 2 - 1 - log 2. r = 1/2: 1/2 - 1 + log 2. r = 1: 0.
    base = torch.tensor([[2.0, 0.5, 1.0]]).log()
    assert kl_estimate(torch.zeros(1, 3), base) == approx([[1 - math.log(2), math.log(2) - 0.5, 0.0]])


def test_kl_estimate_is_the_kl_in_the_mean() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact: Tensor = (p * (p / q).log()).sum()
    assert (p * kl_estimate(p.log(), q.log())).sum().item() == pytest.approx(exact.item(), abs=1e-6)


def test_the_gradient_of_the_kl_estimate_is_that_of_the_other_direction_in_the_mean() -> None:
    logits, base = torch.tensor([0.5, -1.0, 0.2, 1.5], requires_grad=True), torch.tensor([1.0, 0.0, -0.5, 0.3])
    logprobs, base_logprobs = torch.log_softmax(logits, -1), torch.log_softmax(base, -1)
    # The mean over tokens sampled from pi: each with its probability, which is no part of the loss.
    penalty = (logprobs.exp().detach() * kl_estimate(logprobs, base_logprobs)).sum()
    (found,) = torch.autograd.grad(penalty, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(full_kl(base, logits), logits)
    (direct,) = torch.autograd.grad(full_kl(logits, base), logits)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, direct, atol=1e-2)
    assert penalty.item() == pytest.approx(full_kl(logits, base).item(), abs=1e-6)


def test_full_kl_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2). Logits count up to a constant.
    logits_p, logits_q = torch.tensor([[math.log(3) + 7, 7.0]]), torch.tensor([[0.0, 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert full_kl(logits_p, logits_q).item() == pytest.approx(expected, abs=1e-6)
    assert full_kl(logits_p, logits_p).item() == 0


def test_token_entropy_by_hand() -> None:
    # (1/2, 1/4, 1/4): 1/2 log 2 + 1/2 log 4 = 3/2 log 2. Uniform over 3: log 3. One sure token: nearly 0.
    p_NV = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1 - 2e-9, 1e-9, 1e-9]])
    assert token_entropy(p_NV.log()) == pytest.approx(torch.tensor([1.5 * math.log(2), math.log(3), 0.0]), abs=1e-6)


def test_the_gradient_of_the_entropy_by_hand_and_by_autograd() -> None:
    logits_NV = torch.tensor([[math.log(2), 0.0, 0.0], [3.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weights_N = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad((token_entropy(torch.log_softmax(logits_NV, -1)) * weights_N).sum(), logits_NV)
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    plain_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    (reference,) = torch.autograd.grad((plain_N * weights_N).sum(), logits_NV)
    assert torch.allclose(ours, reference, atol=1e-12)
    # dH/dz = -p (log p + H). p = (1/2, 1/4, 1/4), H = 3/2 log 2: -(1/2)(1/2 log 2), (1/4)(1/2 log 2) twice.
    assert ours[0].tolist() == pytest.approx([-0.25 * math.log(2), 0.125 * math.log(2), 0.125 * math.log(2)])
    assert torch.autograd.gradcheck(token_entropy, torch.log_softmax(logits_NV, -1).detach().requires_grad_())


def test_the_entropy_keeps_nothing_of_the_vocabularys_size_but_the_log_probs() -> None:
    logprobs_NV = torch.log_softmax(torch.randn(4, 50, requires_grad=True), -1)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_entropy(logprobs_NV)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= 50] == [logprobs_NV.data_ptr()]
