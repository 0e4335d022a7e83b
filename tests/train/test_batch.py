from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer.errors import TrainingError
from fst_optimizer.train.batch import make_batch, plan_microbatches, signal_weights, token_weights, trainable
from fst_optimizer.types import Call, TrainRow


def row(prompt: int = 1, completion: int = 1, rollout: int = 0, group: int = 0, **call: object) -> TrainRow:
    call_settings = {
        "predictor": "answer",
        "prompt_ids": tuple(range(1, 1 + prompt)),
        "completion_ids": tuple(range(11, 11 + completion)),
        "logprobs": tuple(-0.5 - i for i in range(completion)),
        "temperature": 1.0,
        "policy_version": 0,
        "finish_reason": "stop",
    }
    return TrainRow(Call(**{**call_settings, **call}), 1.5, rollout, group)  # type: ignore[arg-type]


def test_rows_are_padded_on_the_right() -> None:
    batch = make_batch([row(2, 3), row(1, 1, temperature=0.7)], pad_id=9, weights=[0.25, 0.5])
    assert batch.input_ids_BT.tolist() == [[1, 2, 11, 12, 13], [1, 11, 9, 9, 9]]
    assert batch.completion_mask_BT.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.old_logprobs_BT.tolist() == [[0, 0, -0.5, -1.5, -2.5], [0, -0.5, 0, 0, 0]]
    assert batch.weights_BT.tolist() == [[0, 0, 0.25, 0.25, 0.25], [0, 0.5, 0, 0, 0]]
    assert batch.advantages_B.tolist() == [1.5, 1.5]
    assert batch.temperatures_B.tolist() == pytest.approx([1.0, 0.7])


def test_greedy_calls_are_scored_at_temperature_one() -> None:
    assert make_batch([row(temperature=0.0)], pad_id=0).temperatures_B.tolist() == [1.0]


def test_a_call_without_all_its_logprobs_is_refused() -> None:
    with pytest.raises(TrainingError, match="3 completion tokens but 1 log-probs"):
        make_batch([row(1, 3, logprobs=(-1.0,))], pad_id=0)


def test_a_call_without_a_prompt_is_refused() -> None:
    with pytest.raises(TrainingError, match="empty prompt"):
        make_batch([row(0, 3)], pad_id=0)


def test_cut_and_empty_completions() -> None:
    cut, empty, whole = row(finish_reason="length"), row(completion=0), row()
    assert trainable([cut, empty, whole], train_truncated=True) == [cut, whole]
    assert trainable([cut, empty, whole], train_truncated=False) == [whole]


# Rollout 0 made two calls of 2 and 4 tokens, rollout 1 one call of 2: 8 tokens, 2 rollouts.
THREE_CALLS = [row(1, 2, 0), row(1, 4, 0), row(1, 2, 1)]


def test_token_average_counts_every_token_the_same() -> None:
    assert token_weights(THREE_CALLS, "token") == [1 / 8, 1 / 8, 1 / 8]


def test_rollout_average_counts_every_rollout_the_same() -> None:
    # 1 / (6 * 2) for rollout 0's six tokens, 1 / (2 * 2) for rollout 1's two.
    assert token_weights(THREE_CALLS, "rollout") == [1 / 12, 1 / 12, 1 / 4]


def test_prompt_average_counts_every_group_the_same_and_in_it_every_token() -> None:
    # Group 0: rollout 0 with calls of 2 and 4 tokens, rollout 1 with one of 2, so 8 tokens. Group 7: one call of 4.
    rows = [row(1, 2, 0, 0), row(1, 4, 0, 0), row(1, 2, 1, 0), row(1, 4, 2, 7)]
    # 1 / (8 * 2) and 1 / (4 * 2): each group has half of the weight.
    assert token_weights(rows, "prompt") == [1 / 16, 1 / 16, 1 / 16, 1 / 8]
    # By rollout it would be 1 / (6 * 3), 1 / (2 * 3) and 1 / (4 * 3); by token 1 / 12.
    assert token_weights(rows, "rollout") == [1 / 18, 1 / 18, 1 / 6, 1 / 12]
    assert token_weights(rows, "token") == [1 / 12] * 4


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(1, 4))
def test_groups_of_as_many_tokens_are_averaged_by_prompt_as_by_token(groups: list[list[int]], rollouts: int) -> None:
    most = max(map(sum, groups))
    whole = [[*lengths, *([most - sum(lengths)] if sum(lengths) < most else [])] for lengths in groups]
    rows = [
        row(1, length, i % rollouts, group) for group, lengths in enumerate(whole) for i, length in enumerate(lengths)
    ]
    assert token_weights(rows, "prompt") == pytest.approx(token_weights(rows, "token"))


def test_constant_average_does_not_depend_on_the_answer() -> None:
    assert token_weights(THREE_CALLS, "constant", max_completion_tokens=16) == [1 / 32] * 3
    # Without a constant, the longest completion: 1 / (2 * 4).
    assert token_weights(THREE_CALLS, "constant") == [1 / 8] * 3


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ValueError, match="'call'"):
        token_weights(THREE_CALLS, "call")


lengths = st.lists(st.integers(1, 300), max_size=40)


@settings(deadline=None)
@given(lengths, st.integers(1, 1000))
def test_every_row_is_in_one_microbatch_within_budget(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget)
    assert sorted(index for micro in plan for index in micro) == list(range(len(lengths)))
    for micro in plan:
        assert micro
        assert len(micro) == 1 or len(micro) * max(lengths[i] for i in micro) <= budget


@settings(deadline=None)
@given(lengths, st.integers(1, 1000))
def test_rows_are_planned_longest_first(lengths: list[int], budget: int) -> None:
    order = [lengths[index] for micro in plan_microbatches(lengths, budget) for index in micro]
    assert order == sorted(lengths, reverse=True)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=20
    ),
    st.sampled_from(["token", "rollout", "prompt"]),
)
def test_weights_sum_to_one(shapes: list[tuple[int, int, int, int]], average: str) -> None:
    rows = [row(*shape) for shape in shapes]
    weights_BT = make_batch(rows, 0, token_weights(rows, average)).weights_BT
    assert weights_BT.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_batch_moves_to_a_device_whole(make_rows: Callable[..., list[TrainRow]]) -> None:
    batch = make_batch(make_rows(), 0)
    moved = batch.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())


@pytest.mark.parametrize("average", ["token", "rollout", "prompt", "constant"])
def test_rows_of_flat_groups_change_no_weight_of_the_others(average: str) -> None:
    signal = [row(1, 1), row(1, 3, rollout=1), row(1, 4, rollout=2, group=1)]
    flat = [replace(row(1, 9), rollout=number, group=number, flat=True) for number in (3, 4)]
    mixed = [flat[0], *signal, flat[1]]
    assert signal_weights(mixed, average) == [0.0, *token_weights(signal, average), 0.0]
    assert signal_weights(flat, average) == [0.0, 0.0]
    # The penalties are means over all rows, by the same rule.
    assert all(weight > 0 for weight in token_weights(mixed, average))


def test_a_batch_has_both_shares_of_a_token() -> None:
    batch = make_batch([row(1, 1), replace(row(1, 2), flat=True)], 0, [1.0, 0.0], [1 / 3, 1 / 3])
    assert batch.weights_BT.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch.penalty_weights_BT.flatten().tolist() == pytest.approx([0, 1 / 3, 0, 0, 1 / 3, 1 / 3])
