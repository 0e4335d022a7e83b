from dataclasses import replace

import optuna
import pytest
from hypothesis import given, settings, strategies
from optuna.trial import FixedTrial

from fst_optimizer.config.overrides import Settings
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.engines.vllm.installed import RANKS
from fst_optimizer.errors import UserError
from fst_optimizer.tuning.space import (
    all_values,
    default_space,
    largest_rank,
    parameters_of,
    suggest,
    with_values,
)
from fst_optimizer.tuning.space_check import check_space

BASE = Settings()


class Drawn:
    """Draws by hypothesis, as a sampler would."""

    def __init__(self, data):
        self.data = data

    def suggest_float(self, name, low, high, *, step, log):
        return self.data.draw(strategies.floats(low, high), label=name)

    def suggest_int(self, name, low, high, *, step, log):
        return self.data.draw(strategies.integers(low, high), label=name)

    def suggest_categorical(self, name, choices):
        return self.data.draw(strategies.sampled_from(choices), label=name)


@settings(max_examples=200, deadline=None)
@given(strategies.data())
def test_whatever_is_drawn_from_the_default_space_is_a_valid_run(data):
    values = suggest(Drawn(data), default_space(), BASE)
    made = with_values(BASE, values)
    assert made.config.rollout.group_size % made.config.fast.population == 0
    assert made.lora.rank in RANKS
    assert made.lora.alpha % made.lora.rank == 0
    assert made.config.rollout.truncated_reward == made.config.rollout.parse_error_reward
    assert ("train.ratio_cap" in values) == (made.config.train.loss == "cispo")
    assert ("train.clip_high" in values) == (made.config.train.loss != "cispo")


def test_the_default_space_has_what_a_study_should_look_for():
    assert set(default_space()) >= {
        *("train.steps_per_cycle", "fast.population", "rollout.group_size", "train.loss", "train.ratio_cap"),
        *("train.lr", "lora.rank", "lora.alpha", "rollout.temperature", "train.kl_coef", "fast.max_rollouts"),
        *("fast.minibatch", "rollout.parse_error_reward"),
    }
    assert default_space()["train.lr"]["log"]
    check_space(default_space(), BASE)


@settings(max_examples=50, deadline=None)
@given(strategies.data())
def test_parameters_come_back_from_the_settings_that_they_gave(data):
    class Noted(Drawn):
        def __init__(self, data):
            super().__init__(data)
            self.params = {}

        def suggest_float(self, name, low, high, *, step, log):
            self.params[name] = super().suggest_float(name, low, high, step=step, log=log)
            return self.params[name]

        def suggest_int(self, name, low, high, *, step, log):
            self.params[name] = super().suggest_int(name, low, high, step=step, log=log)
            return self.params[name]

        def suggest_categorical(self, name, choices):
            self.params[name] = super().suggest_categorical(name, choices)
            return self.params[name]

    drawn = Noted(data)
    made = with_values(BASE, suggest(drawn, default_space(), BASE))
    assert parameters_of(made, default_space()) == drawn.params
    again = with_values(BASE, suggest(FixedTrial(drawn.params), default_space(), BASE))
    assert again == made


@pytest.mark.parametrize("name", ["light", "medium", "heavy"])
def test_the_presets_lie_in_the_default_space(name):
    made = replace(BASE, config=preset(name))
    params = parameters_of(made, default_space())
    assert with_values(made, suggest(FixedTrial(params), default_space(), made)) == made


def test_a_divisor_that_depends_on_the_group_is_a_parameter_for_each_set_of_choices():
    space = {
        "rollout.group_size": {"type": "choice", "choices": [4, 6, 8]},
        "fast.population": {"type": "divisor", "of": "rollout.group_size", "choices": [1, 2, 3, 4]},
    }
    check_space(space, BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study.optimize(lambda trial: len(suggest(trial, space, BASE)), n_trials=30)
    names = {frozenset(trial.params) for trial in study.trials}
    assert names == {
        frozenset({"rollout.group_size", "fast.population of 1, 2, 4"}),
        frozenset({"rollout.group_size", "fast.population of 1, 2, 3"}),
    }
    assert all(trial.params["rollout.group_size"] % list(trial.params.values())[1] == 0 for trial in study.trials)


def test_a_divisor_of_a_setting_that_is_not_tuned_keeps_to_it():
    space = {"fast.population": {"type": "divisor", "of": "rollout.group_size", "choices": [1, 2, 3]}}
    values = suggest(FixedTrial({"fast.population of 1, 2": 2}), space, BASE)  # G is 8
    assert values == {"fast.population": 2}


def test_the_engine_is_started_for_the_largest_rank():
    assert largest_rank(default_space(), BASE) == 32
    assert largest_rank({"train.lr": default_space()["train.lr"]}, replace(BASE, lora=LoraConfig(rank=8))) == 8


def test_a_base_with_its_own_adapter_keeps_what_is_not_tuned():
    base = replace(BASE, lora=LoraConfig(rank=8, alpha=16, dropout=0.1, target_modules=("q_proj",)))
    made = with_values(base, {"lora.rank": 16})
    assert made.lora == LoraConfig(rank=16, alpha=16, dropout=0.1, target_modules=("q_proj",))
    assert all_values(base)["lora.target_modules"] == ["q_proj"]


LR = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
WRONG = {
    "unknown setting": ({"train.lrr": LR}, "did you mean 'train.lr'"),
    "unknown type": ({"train.lr": {**LR, "type": "flaot"}}, "did you mean 'float'"),
    "unknown field": ({"train.lr": {**LR, "hihg": 3}}, "did you mean 'high'"),
    "lacking field": ({"train.lr": {"type": "float", "low": 1.0}}, "needs high"),
    "reversed": ({"train.lr": {**LR, "low": 1.0}}, "is reversed"),
    "empty": ({"train.lr": {**LR, "low": 1e-2}}, "is empty"),
    "no number": ({"train.lr": {**LR, "low": "a"}}, "give numbers"),
    "infinite": ({"train.lr": {**LR, "high": float("inf")}}, "give numbers"),
    "log of zero": ({"train.kl_coef": {**LR, "low": 0}}, "above 0"),
    "half a step": ({"train.steps_per_cycle": {"type": "int", "low": 1, "high": 4, "step": 0}}, "step is 0"),
    "fraction": ({"train.steps_per_cycle": {"type": "int", "low": 1.5, "high": 4}}, "whole numbers"),
    "no choices": ({"train.loss": {"type": "choice", "choices": []}}, "at least one value"),
    "twice": ({"train.loss": {"type": "choice", "choices": ["cispo", "cispo"]}}, "each once"),
    "refused choice": ({"train.loss": {"type": "choice", "choices": ["cispo", "sft"]}}, "train.loss is 'sft'"),
    "refused end": ({"rollout.temperature": {"type": "float", "low": 0.0, "high": 1.0}}, "rollout.temperature is 0.0"),
    "unserved rank": ({"lora.rank": {"type": "choice", "choices": [8, 12]}}, "ranks that vLLM serves"),
    "range of ranks": ({"lora.rank": {"type": "int", "low": 8, "high": 16}}, "ranks that vLLM serves"),
    "of what": ({"lora.alpha": {"type": "multiple", "of": "train.loss", "times": [1]}}, "whole number"),
    "below": (
        {
            "lora.alpha": {"type": "multiple", "of": "lora.rank", "times": [1]},
            "lora.rank": {"type": "choice", "choices": [8]},
        },
        "move lora.rank up",
    ),
    "no divisor": (
        {"fast.population": {"type": "divisor", "of": "rollout.group_size", "choices": [3, 5]}},
        "give 1 among them",
    ),
    "set twice": ({"train.lr": LR, "train.kl_coef": {**LR, "also": ["train.lr"]}}, "twice"),
    "K that does not divide G": ({"fast.population": {"type": "choice", "choices": [1, 3]}}, "must be divisible"),
    "the seed": ({"seed": {"type": "int", "low": 0, "high": 9}}, "must have the same"),
    "the budget": ({"budget.max_rollouts": {"type": "int", "low": 10, "high": 90}}, "must have the same"),
    "the engine": ({"vllm.max_in_flight": {"type": "int", "low": 1, "high": 9}}, "must have the same"),
    "threads": ({"rollout.num_threads": {"type": "int", "low": 1, "high": 9}}, "must have the same"),
    "nothing": ({}, "is empty"),
}


@pytest.mark.parametrize(("space", "text"), WRONG.values(), ids=WRONG)
def test_a_space_that_a_run_would_refuse_is_refused(space, text):
    with pytest.raises(UserError, match=text):
        check_space(space, BASE)


def test_conditions_are_checked_too():
    loss = {"type": "choice", "choices": ["cispo", "grpo"]}
    check_space({"train.loss": loss, "train.ratio_cap": {**LR, "high": 3, "if": {"train.loss": ["cispo"]}}}, BASE)
    with pytest.raises(UserError, match=r"did you mean 'train\.loss'"):
        check_space({"train.lr": {**LR, "if": {"train.los": ["cispo"]}}}, BASE)
    assert FSTConfig().train.loss == "cispo"  # a condition on what is not tuned asks the base
    assert set(suggest(FixedTrial({"train.lr": 1e-3}), {"train.lr": {**LR, "if": {"train.loss": ["cispo"]}}}, BASE))
    assert not suggest(FixedTrial({}), {"train.lr": {**LR, "if": {"train.loss": ["grpo"]}}}, BASE)
