import json
from pathlib import Path

import pytest

from fst_optimizer.cli.options import Preset
from fst_optimizer.config.formats import ELSEWHERE
from fst_optimizer.config.overrides import assignments, base_config, check_names, flat, read_settings, settled
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import FastConfig, FSTConfig, TrainConfig
from fst_optimizer.errors import UserError
from fst_optimizer.tasks import load_task

PROGRAMS = Path(__file__).parents[2] / "programs"
DEFAULTS = FSTConfig().to_dict()


def test_later_layers_win():
    settings = settled(FSTConfig(), {"seed": 1, "train.lr": 1e-2}, {"seed": 2}, {"train.lr": 5e-4})
    assert (settings.config.seed, settings.config.train.lr) == (2, 5e-4)


def test_layers_are_checked_together_and_not_one_by_one():
    # The method needs the cap that only the next layer brings.
    settings = settled(FSTConfig(), {"method": "sequential"}, {"budget.max_rollouts": 100})
    assert settings.config.method == "sequential"


def test_values_are_json_where_they_parse_and_strings_elsewhere():
    pairs = ["train.lr=1e-3", "train.betas=[0.8, 0.9]", "train.loss=grpo", "fast.reflection_calls=null"]
    found = assignments(pairs)
    assert found == {"train.lr": 1e-3, "train.betas": [0.8, 0.9], "train.loss": "grpo", "fast.reflection_calls": None}
    assert settled(FSTConfig(), found).config.train.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train.lr", "--set is 'train.lr': give NAME=VALUE"),
        ("=3", "give NAME=VALUE"),
        ("train.lrr=1", "unknown setting 'train.lrr'; did you mean 'train.lr'?"),
        ("lr=1", "unknown setting 'lr'; did you mean 'train.lr'?"),
        ("train=1", "setting 'train' is a section: set one of train.steps_per_cycle"),
        ("guards.kl=pause", "unknown setting 'guards.kl'; did you mean 'monitors.kl'?"),
        ("guards.formats=off", "unknown setting 'guards.formats'; did you mean 'monitors.format'?"),
        ("lora.rank=0", "lora.rank is 0"),
        ("policy.max_tokens=none", "policy.max_tokens is 'none'"),
        ("train.learning_rate=1", "unknown setting 'train.learning_rate'; did you mean 'train.lr'?"),
        ("num_generations=8", "unknown setting 'num_generations'; did you mean 'rollout.group_size'?"),
    ],
)
def test_a_wrong_setting_names_itself_and_the_remedy(pair, message):
    with pytest.raises(UserError) as raised:
        settled(FSTConfig(), assignments([pair]))
    assert message in str(raised.value)


def test_the_adapters_shape_is_a_setting_too():
    settings = settled(FSTConfig(), {"lora.rank": 4, "policy.max_tokens": 48})
    assert settings.lora == LoraConfig(rank=4)
    assert settings.policy.max_tokens == 48


def test_text_that_is_a_number_needs_no_quotes():
    settings = settled(FSTConfig(), assignments(["vllm.devices=1", "vllm.cpu_threads=0"]))
    assert (settings.vllm.devices, settings.vllm.cpu_threads) == ("1", "0")


def test_another_librarys_name_names_ours_in_nested_settings_too():
    with pytest.raises(UserError, match=r"unknown key 'train.learning_rate'; did you mean 'train.lr'\?"):
        FSTConfig.from_dict({"train": {"learning_rate": 1e-3}})


def test_every_name_of_another_library_leads_to_a_setting():
    check_names(ELSEWHERE.values())


def test_a_tasks_own_settings_stand_over_the_preset():
    own = FSTConfig().with_values({"train.lr": 5e-4, "budget.max_cycles": 3})
    assert base_config(own, None) == own
    assert base_config(own, "light") == base_config(own, None)
    heavy = base_config(own, "heavy")
    assert (heavy.train.lr, heavy.budget.max_cycles) == (5e-4, 3)
    assert heavy.fast.anchor_size == preset("heavy").fast.anchor_size
    priced = base_config(FSTConfig().with_values({"budget.prices.some/model-1.5": [1, 2]}), "heavy")
    assert priced.budget.prices == {"some/model-1.5": (1, 2)}


def test_a_task_that_sets_the_default_means_it():
    own = FSTConfig().with_values({"budget.max_cycles": 10, "fast.anchor_size": FSTConfig().fast.anchor_size})
    for auto in (None, "light", "heavy", "paper"):
        config = base_config(own, auto)
        assert (config.budget.max_cycles, config.fast.anchor_size) == (10, 16)
    assert base_config(own, "heavy").fast.max_rollouts == preset("heavy").fast.max_rollouts


@pytest.mark.parametrize("auto", ["light", "medium", "heavy", "paper"])
@pytest.mark.parametrize(
    "own",
    [
        {"train": {"lr": 5e-4}, "fast": {"minibatch": 3}},
        FSTConfig.from_dict({"train": {"lr": 5e-4}, "fast": {"minibatch": 3}}),
        FSTConfig().with_values({"train.lr": 5e-4, "fast.minibatch": 3}),
        FSTConfig(train=TrainConfig(lr=5e-4), fast=FastConfig(minibatch=3)),
        FSTConfig(train=TrainConfig().changed(lr=5e-4), fast=FastConfig().changed(minibatch=3)),
    ],
    ids=["mapping", "from_dict", "with_values", "sections", "changed"],
)
def test_what_is_set_goes_over_the_preset_and_nothing_else_does(own, auto):
    assert base_config(own, auto) == preset(auto).with_values({"train.lr": 5e-4, "fast.minibatch": 3})


def test_a_complete_config_leaves_nothing_to_the_preset():
    own = FSTConfig(train=TrainConfig(lr=5e-4))
    assert own.complete() == own
    assert base_config(own.complete(), "paper") == own
    assert base_config(own, "paper") != own


@pytest.mark.parametrize("task", sorted(path.parent.name for path in PROGRAMS.glob("*/task.py")))
def test_the_preset_below_a_tasks_own_settings_changes_none_of_its_published_numbers(task):
    own = load_task(str(PROGRAMS / task)).config()
    assert own is not None
    # `light` lies under it, and whatever that sets the task sets too: what is run is the defaults and the task's own.
    assert base_config(own, None).to_dict() == own.to_dict()


def test_the_demos_settings_are_the_tasks_own_over_the_defaults():
    config = base_config(load_task(str(PROGRAMS / "letters")).config(), None)
    changed = {name: value for name, value in flat(config.to_dict()).items() if value != flat(DEFAULTS)[name]}
    assert changed == {"train.lr": 2e-3, "budget.max_cycles": 5}


def test_the_command_line_has_every_preset():
    (option,) = Preset.__metadata__
    for name in ("light", "medium", "heavy", "paper"):
        assert base_config(None, name) == preset(name)
        assert name in option.help


def test_without_anything_the_light_preset_is_taken():
    assert base_config(None, None) == preset("light")


def test_a_runs_config_json_gives_that_runs_settings(tmp_path):
    path = tmp_path / "config.json"
    config = FSTConfig().with_values({"train.lr": 7e-4}).to_dict()
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": None}
    path.write_text(
        json.dumps({"task": "t", "config": config, "policy": {"lora": lora, "max_tokens": 9, "model": "m"}})
    )
    settings = settled(FSTConfig(), read_settings(path))
    assert (settings.config.train.lr, settings.lora.rank, settings.policy.max_tokens) == (7e-4, 4, 9)
