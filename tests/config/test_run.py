import json
import math

import pytest

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.run import (
    METHODS,
    BudgetConfig,
    EvalConfig,
    FastConfig,
    FSTConfig,
    RolloutConfig,
    TrainConfig,
    preset,
)
from fst_optimizer.errors import UserError


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FSTConfig(method="fts"), r"method is 'fts': did you mean 'fst'\?"),
        (lambda: FSTConfig(method="zzz"), "choose one of fst, gepa, rl, sequential"),
        (lambda: FSTConfig(seed=-1), "seed is -1"),
        (lambda: RolloutConfig(group_size=1), "rollout.group_size is 1: give a whole number of at least 2"),
        (lambda: RolloutConfig(group_size=4.0), "rollout.group_size is 4.0"),
        (lambda: RolloutConfig(group_size=True), "rollout.group_size is True"),
        (lambda: RolloutConfig(temperature=0), "rollout.temperature is 0"),
        (lambda: RolloutConfig(timeout_s=-1), "rollout.timeout_s"),
        (lambda: RolloutConfig(num_threads=0), "rollout.num_threads"),
        (lambda: RolloutConfig(timeout_reward=math.nan), "rollout.timeout_reward"),
        (lambda: RolloutConfig(parse_error_reward="0"), "rollout.parse_error_reward"),
        (lambda: FastConfig(population=0), "fast.population"),
        (lambda: FastConfig(components="al"), r"fast.components is 'al': did you mean 'all'\?"),
        (lambda: FastConfig(reflection_calls=-1), "fast.reflection_calls"),
        (lambda: TrainConfig(lr=0), "train.lr is 0: give a number above 0"),
        (lambda: TrainConfig(lr="1e-3"), "train.lr is '1e-3'"),
        (lambda: TrainConfig(loss="cisco"), r"train.loss is 'cisco': did you mean 'cispo'\?"),
        (lambda: TrainConfig(average="rollouts"), r"did you mean 'rollout'\?"),
        (lambda: TrainConfig(betas=(0.9,)), "train.betas"),
        (lambda: TrainConfig(betas=0.9), "train.betas is 0.9"),
        (lambda: TrainConfig(betas=(0.9, 1.0)), "train.betas"),
        (lambda: TrainConfig(max_grad_norm=0), "train.max_grad_norm"),
        (lambda: TrainConfig(ratio_cap=math.inf), "train.ratio_cap"),
        (lambda: EvalConfig(max_examples=0), "eval.max_examples"),
        (lambda: BudgetConfig(max_cycles=0), "budget.max_cycles"),
        (lambda: BudgetConfig(max_rollouts=0), "budget.max_rollouts"),
        (lambda: LoraConfig(rank=0), "lora.rank"),
        (lambda: LoraConfig(dropout=1.0), "lora.dropout"),
        (lambda: preset("lihgt"), r"auto is 'lihgt': did you mean 'light'\?"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_remedy(make, named):
    with pytest.raises(UserError, match=named):
        make()


def test_the_group_must_be_divisible_by_the_population():
    with pytest.raises(UserError, match=r"rollout.group_size is 6: it must be divisible by fast.population \(4\)"):
        FSTConfig(rollout=RolloutConfig(group_size=6))


@pytest.mark.parametrize("method", ["rl", "gepa"])
def test_methods_that_do_not_share_groups_over_candidates_need_no_divisible_group(method):
    assert FSTConfig(method=method, rollout=RolloutConfig(group_size=6)).method == method


def test_sequential_needs_a_cap_to_halve():
    with pytest.raises(UserError, match=r"budget.max_rollouts"):
        FSTConfig(method="sequential")
    assert FSTConfig(method="sequential", budget=BudgetConfig(max_rollouts=100)).budget.max_rollouts == 100


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"trian": {}}, r"unknown key 'trian'; did you mean 'train'\?"),
        ({"train": {"learning_rate": 1}}, r"unknown key 'train.learning_rate'"),
        ({"train": {"warmup_step": 1}}, r"did you mean 'warmup_steps'\?"),
        ({"train": 3}, "train is 3: give an object of settings"),
        ([], r"config is \[\]"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(data, named):
    with pytest.raises(UserError, match=named):
        FSTConfig.from_dict(data)


def test_dotted_values_lie_over_a_config_and_leave_the_rest():
    base = FSTConfig(seed=7, train=TrainConfig(loss="grpo"))
    config = base.with_values({"train.lr": 0.5, "fast.population": 2, "method": "rl"})
    assert (config.train.lr, config.train.loss, config.fast.population) == (0.5, "grpo", 2)
    assert (config.method, config.seed) == ("rl", 7)
    assert base.train.lr == TrainConfig().lr


def test_a_dotted_name_below_a_plain_value_is_refused():
    with pytest.raises(UserError, match=r"train.lr"):
        FSTConfig().with_values({"train.lr.peak": 1})


@pytest.mark.parametrize("method", METHODS)
def test_a_config_survives_json(method):
    config = FSTConfig(method=method, budget=BudgetConfig(max_rollouts=640), train=TrainConfig(betas=(0.8, 0.9)))
    assert FSTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_differ_in_how_long_they_run():
    assert [preset(name).budget.max_cycles for name in ("light", "medium", "heavy")] == [4, 12, 40]
