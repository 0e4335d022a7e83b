import copy
import json
import math
import pickle
from pathlib import Path

import pytest

from fst_optimizer.config.policy import LoraConfig, PolicyConfig, VLLMConfig
from fst_optimizer.config.presets import preset
from fst_optimizer.config.rollout import RolloutConfig
from fst_optimizer.config.run import METHODS, BudgetConfig, EvalConfig, FastConfig, FSTConfig, TrainConfig
from fst_optimizer.errors import UserError


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FSTConfig(method="fts"), r"method is 'fts': did you mean 'fst'\?"),
        (lambda: FSTConfig(method="zzz"), "choose one of fst, gepa, once, rl, sequential"),
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
        (lambda: TrainConfig(baseline="prompts"), r"train.baseline is 'prompts': did you mean 'prompt'\?"),
        (lambda: TrainConfig(baseline_share=1.5), "train.baseline_share is 1.5: give a share from 0 to 1"),
        (lambda: RolloutConfig(refill=-1), "rollout.refill is -1: give a whole number of at least 0"),
        (lambda: RolloutConfig(order="random"), "rollout.order is 'random'"),
        (lambda: RolloutConfig(reuse="all"), "rollout.reuse is 'all'"),
        (lambda: RolloutConfig(shares="even"), "rollout.shares is 'even': choose one of equal, posterior"),
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


def test_rollouts_are_reused_only_where_they_are_sampled_alike():
    text = (
        "rollout.reuse is 'first_step' and fast.temperature is 0.0: a group takes rollouts sampled at "
        "rollout.temperature alone; set fast.temperature=1.0, or rollout.reuse='none'"
    )
    with pytest.raises(UserError) as raised:
        FSTConfig().with_values({"rollout.reuse": "first_step"})
    assert str(raised.value) == text
    alike = {"rollout.reuse": "first_step", "rollout.temperature": 0.7, "fast.temperature": 0.7}
    assert FSTConfig().with_values(alike).rollout.reuse == "first_step"
    for method in ("rl", "gepa"):  # where it has no effect, nothing must fit
        assert FSTConfig().with_values({"rollout.reuse": "first_step", "method": method}).method == method


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
        ({"guards": {"kl": "pause"}}, r"unknown key 'guards'; did you mean 'monitors'\?"),
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


def test_a_changed_copy_is_checked_like_a_new_one():
    train = TrainConfig(loss="grpo")
    assert train.changed(lr=0.5) == TrainConfig(loss="grpo", lr=0.5)
    assert train.lr == TrainConfig().lr
    with pytest.raises(UserError, match=r"train.lr is -1: give a number above 0"):
        train.changed(lr=-1)
    with pytest.raises(UserError, match=r"unknown key 'train.lrr'; did you mean 'lr'\?"):
        train.changed(lrr=1)


def test_settings_cannot_be_changed_in_place():
    config = FSTConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 3.0


def test_settings_are_values():
    made = [FSTConfig().with_values({"train.lr": 1, "predictors.answer": "train"}) for _ in range(2)]
    assert made[0] == made[1] != FSTConfig()
    assert pickle.loads(pickle.dumps(made[0])) == copy.deepcopy(made[0]) == made[0]
    assert {LoraConfig(rank=4), LoraConfig(rank=4), LoraConfig()} == {LoraConfig(), LoraConfig(rank=4)}
    assert repr(LoraConfig(rank=4)) == "LoraConfig(rank=4, alpha=32, dropout=0.0, target_modules=None)"


def test_lists_from_json_become_tuples():
    assert LoraConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
    assert VLLMConfig(log_file=Path("logs") / "vllm.log").log_file == "logs/vllm.log"
    assert VLLMConfig(flags=["--enforce-eager"]).flags == ("--enforce-eager",)
    assert BudgetConfig(prices={"openai/gpt-5.2": [1, 2]}).prices == {"openai/gpt-5.2": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": {"lr": -1}}, "train.lr is -1: give a number above 0"),
        ({"train": {"own_share": 2}}, "train.own_share is 2: give a share from 0 to 1"),
        ({"train": {"train_truncated": 1}}, "train.train_truncated is 1: give true or false"),
        ({"monitors": {"kl": "stop"}}, "monitors.kl is 'stop': choose one of off, pause, warn"),
        ({"predictors": {"a.b": "trian"}}, r"predictors.a.b is 'trian': did you mean 'train'\?"),
        ({"predictors": ["a"]}, r"predictors is \['a'\]: give an object of names and roles"),
        ({"predictors": {1: "train"}}, "predictors is {1: 'train'}: give an object of names and roles"),
        ({"budget": {"prices": {"m/x": [1, -2]}}}, r"budget.prices.m/x is \[1, -2\]: give two numbers of at least 0"),
        ({"budget": {"prices": [1]}}, r"budget.prices is \[1\]: give an object of models"),
        ({"budget": None}, "config: budget is None: give an object of settings"),
    ],
)
def test_nested_settings_name_their_section(data, named):
    with pytest.raises(UserError, match=named):
        FSTConfig.from_dict(data)
    with pytest.raises(UserError, match=named):
        FSTConfig(**data)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LoraConfig(target_modules="q_proj"), "lora.target_modules is 'q_proj': give a list of names"),
        (lambda: LoraConfig(rank="8"), "lora.rank is '8': give a whole number of at least 1"),
        (lambda: LoraConfig(dropout=1.5), "lora.dropout is 1.5: give a number of at least 0 and below 1"),
        (lambda: VLLMConfig(devices=1.5), "vllm.devices is 1.5: give a string"),
        (lambda: VLLMConfig(max_modl_len=1), r"unknown key 'vllm.max_modl_len'; did you mean 'max_model_len'\?"),
        (lambda: PolicyConfig(max_tokens=True), "policy.max_tokens is True: give a whole number of at least 1"),
    ],
)
def test_a_policys_settings_are_checked_too(make, named):
    with pytest.raises(UserError, match=named):
        make()
