"""Arguments that go by the names that `dspy.GEPA` and its siblings have for them."""

import inspect

import dspy
import pytest

from fst_optimizer import FST, FSTConfig, UserError
from fst_optimizer.config.arguments import by_arguments, check_keywords, run_folder


def metric(example, prediction):
    return 1.0


def test_the_names_are_those_of_dspys_gepa():
    theirs, ours = inspect.signature(dspy.GEPA).parameters, inspect.signature(FST).parameters
    shared = {"metric", "auto", "reflection_lm", "seed", "num_threads", "log_dir", "track_stats"}
    assert shared <= theirs.keys() & ours.keys()
    assert all(ours[name].kind is theirs[name].kind for name in shared)
    base = inspect.signature(dspy.teleprompt.Teleprompter.compile).parameters
    # BetterTogether passes on what the signature names, and nothing else.
    assert base.keys() | {"seed", "num_threads"} <= inspect.signature(FST.compile).parameters.keys()


def test_arguments_are_settings():
    fst = FST(metric, seed=7, num_threads=3)
    assert (fst.config.seed, fst.config.rollout.num_threads, fst.config.budget.max_cycles) == (7, 3, 4)
    assert (FST(metric).config.seed, FST(metric).config.rollout.num_threads) == (0, 64)


@pytest.mark.parametrize("config", [{"seed": 1, "rollout": {"num_threads": 2}}, FSTConfig(seed=1)])
def test_an_argument_wins_over_the_config_and_none_is_not_given(config):
    assert FST(metric, config=config, seed=0).config.seed == 0
    assert FST(metric, config=config).config.seed == 1
    assert FST(metric, config=config, num_threads=5).config.rollout.num_threads == 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seed": -1}, "seed is -1: give a whole number of at least 0"),
        ({"seed": True}, "seed is True: give a whole number of at least 0"),
        ({"seed": "0"}, "seed is '0': give a whole number"),
        ({"num_threads": 0}, "rollout.num_threads is 0: give a whole number of at least 1"),
        ({"num_threads": 2.0}, "rollout.num_threads is 2.0: give a whole number"),
    ],
)
def test_a_wrong_argument_is_refused_as_the_setting_is(arguments, named):
    with pytest.raises(UserError, match=named):
        FST(metric, **arguments)
    with pytest.raises(UserError, match=named):
        by_arguments(FSTConfig(), **arguments)


def test_log_dir_is_run_dir_by_another_name(tmp_path):
    assert FST(metric, log_dir=tmp_path / "run").run_dir == tmp_path / "run"
    assert FST(metric, log_dir=str(tmp_path), run_dir=tmp_path).run_dir == tmp_path
    assert FST(metric, log_dir=str(tmp_path), resume=True).resume
    assert run_folder(None, None) is None
    with pytest.raises(UserError, match=r"run_dir is 'a' and log_dir is 'b': both name the run's folder; give one"):
        FST(metric, run_dir="a", log_dir="b")


def test_settings_go_over_the_preset_in_python():
    assert FST(metric).config.budget.max_cycles == 4
    for config in ({"train": {"lr": 5e-4}}, FSTConfig().with_values({"train.lr": 5e-4}), {}, FSTConfig()):
        assert FST(metric, config=config).config.budget.max_cycles == 4
        heavy = FST(metric, auto="heavy", config=config).config
        assert (heavy.budget.max_cycles, heavy.fast.anchor_size) == (40, 32)
    assert FST(metric, auto="heavy", config={"budget": {"max_cycles": 10}}).config.budget.max_cycles == 10
    assert FST(metric, auto="heavy", config=FSTConfig().complete()).config == FSTConfig()
    with pytest.raises(UserError, match=r"auto is 'papr': did you mean 'paper'\?"):
        FST(metric, auto="papr", config={})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("valsett", "compile was given 'valsett', which it does not take; did you mean 'valset'?"),
        ("num_thread", "compile was given 'num_thread', which it does not take; did you mean 'num_threads'?"),
        ("run_dir", "compile was given 'run_dir', which is the optimizer's: FST(..., run_dir=...)"),
        ("log_dir", "compile was given 'log_dir', which is the optimizer's: FST(..., log_dir=...)"),
        ("max_bootstrapped_demos", "which it does not take; choose one of num_threads, seed, student, teacher,"),
        ("kwargs", "compile was given 'kwargs', which it does not take"),
    ],
)
def test_compile_drops_no_keyword_unseen(name, message):
    of_compile = ("student", "trainset", "teacher", "valset", "seed", "num_threads", "kwargs")
    of_optimizer = ("metric", "run_dir", "log_dir", "seed", "num_threads")
    with pytest.raises(UserError) as raised:
        check_keywords([name], of_compile, of_optimizer)
    assert message in str(raised.value)
    with pytest.raises(UserError) as raised:
        FST(metric).compile(dspy.Predict("q -> a"), trainset=[], **{name: 1})
    assert message.split(",")[0] in str(raised.value)
    check_keywords([], of_compile, of_optimizer)
