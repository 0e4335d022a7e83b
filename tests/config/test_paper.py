"""The preset `paper` beside what arXiv 2605.12484 gives, number by number."""

import pytest

from fst_optimizer.config.overrides import flat
from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.run.batches import draw_anchor, next_batches
from fst_optimizer.types import Item

PAPER = preset("paper")
APPENDIX = "appendix, as others cite it"
PUBLISHED = {
    # setting: (the paper's number, where it stands)
    "rollout.group_size": (8, "hyper-parameters: G = 8"),
    "fast.population": (4, "hyper-parameters: K in {4, 8}"),
    "train.steps_per_cycle": (6, "T = 6 RL steps per GEPA round, by a reading note"),
    "rollout.batch_size": (32, "32 problems a batch: 192 examples a cycle over 6 steps, 1536 RL rollouts"),
    "fast.anchor_size": (192, f"{APPENDIX}: GEPA on 192 examples a cycle"),
    "fast.max_rollouts": (960, f"{APPENDIX}: GEPA budget of 960 metric calls a cycle"),
    "rollout.temperature": (1.0, "temperature 1: said to be the paper's, not in the text that we could read"),
    "train.loss": ("cispo", "the method: CISPO, -E[sg(min(rho, tau)) A log pi]"),
    "train.ratio_cap": (4.0, f"{APPENDIX}: CISPO cap tau = 4.0"),
    "train.kl_coef": (0.001, f"{APPENDIX}: KL coefficient 0.001"),
    "train.betas": ((0.9, 0.999), f"{APPENDIX}: AdamW betas 0.9/0.999"),
    "train.weight_decay": (0.0, f"{APPENDIX}: weight decay 0"),
    "train.warmup_steps": (10, f"{APPENDIX}: 10-step warm-up"),
    "train.max_grad_norm": (None, f"{APPENDIX}: no gradient clipping stated"),
    "train.average": ("prompt", f"{APPENDIX}: loss averaged per prompt"),
}
OURS = {
    "budget.max_cycles": 34,  # 34 x 6 = 204 steps: 200 are trained on each task of the paper's sequence of three
    "fast.max_proposals": 240,  # 240 x 4 = 960: the calls end a round
    "fast.patience": 0,  # GEPA goes on until its calls are spent
}


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name, (value, _) in PUBLISHED.items()])
def test_a_number_of_the_preset_is_the_papers(setting, value):
    section, name = setting.split(".")
    assert getattr(getattr(PAPER, section), name) == value


def test_what_else_the_preset_sets_is_ours_and_the_learning_rate_is_the_default():
    assert set(flat(PAPER.given())) == {*PUBLISHED, *OURS}
    assert {name: flat(PAPER.to_dict())[name] for name in OURS} == OURS
    assert PAPER.train.lr == FSTConfig().train.lr  # none was published


def test_a_cycle_costs_what_the_papers_does():
    slow = PAPER.train.steps_per_cycle * PAPER.rollout.batch_size * PAPER.rollout.group_size
    assert (PAPER.fast.max_rollouts, slow) == (960, 1536)
    assert PAPER.budget.max_cycles * PAPER.train.steps_per_cycle >= 200
    assert (PAPER.budget.max_cycles - 1) * PAPER.train.steps_per_cycle < 200


def test_only_the_calls_end_a_round():
    fast = PAPER.fast
    assert fast.max_proposals * min(fast.minibatch, fast.anchor_size) >= fast.max_rollouts
    assert fast.patience == 0
    # A whole population is rescored, and one proposal can still be accepted.
    assert fast.max_rollouts == (fast.population + 1) * fast.anchor_size


def test_the_anchor_of_192_is_all_that_the_cycles_batches_use():
    train = tuple(Item(f"train-{index}", None) for index in range(192 * 3))
    for cycle in range(3):
        batches = next_batches(train, PAPER, cycle * PAPER.train.steps_per_cycle)
        anchor = draw_anchor(batches, PAPER, cycle)
        assert len(anchor) == len({item.id for item in anchor}) == 192
        assert {item.id for item in anchor} == {item.id for batch in batches for item in batch}


@pytest.mark.parametrize(("examples", "least"), [(20, 20), (100, 100), (250, 134)])
def test_the_anchor_is_smaller_where_batches_see_examples_again(examples, least):
    # A cycle that begins in one epoch and ends in the next may meet up to 58 of 250 examples twice: 192 - 58 = 134.
    train = tuple(Item(f"train-{index}", None) for index in range(examples))
    for cycle in range(12):
        anchor = draw_anchor(next_batches(train, PAPER, cycle * 6), PAPER, cycle)
        assert least <= len(anchor) <= min(192, examples)
        assert len(anchor) == len({item.id for item in anchor})
