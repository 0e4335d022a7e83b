"""Copies and pickles of programs on a policy's LM, and what it refuses in a compile."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys

import cloudpickle
import dspy
import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.policy.lm import DetachedEngine
from fst_optimizer.policy.policy import Policy
from helpers.toy import SHORT, TRAIN, VAL, Program, answer, optimizer, student_of


@pytest.fixture
def policy(scripted):
    return scripted(answer)


@pytest.fixture
def compiled(policy, tmp_path):
    made = optimizer(tmp_path / "run", settings=SHORT).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    policy.lm("a prompt with a secret")  # into the LM's history
    return made


# --- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda program: program.deepcopy()])
def test_a_compiled_program_is_copied_without_a_word_and_shares_the_weights(compiled, policy, copied, caplog):
    with caplog.at_level(logging.DEBUG):
        made = copied(compiled)
    assert caplog.records == []
    assert made.first.lm is not compiled.first.lm
    assert made.first.lm.engine is compiled.first.lm.engine
    assert made.detailed_results.result == compiled.detailed_results.result
    assert made.detailed_results.best == compiled.detailed_results.best
    assert made(question="q").answer in ("right", "wrong")


def test_best_of_n_runs_on_a_compiled_program(compiled, caplog):
    best = dspy.BestOfN(compiled, N=2, reward_fn=lambda inputs, prediction: 0.0, threshold=1.0)
    with caplog.at_level(logging.WARNING):
        assert best(question="q").answer in ("right", "wrong")
    assert caplog.records == []


# --- Pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_in_the_same_process_an_lm_finds_its_policy_again(policy, pickler):
    version = policy.publish()
    for lm in (policy.lm.copy(temperature=0.5), policy.latest_lm, policy.lm_at(version), policy.base_lm):
        again = pickler.loads(pickler.dumps(lm))
        assert repr(again) == repr(lm)
        assert again.engine.policy is policy
        assert (again.pinned, again.engine.trainable) == (lm.pinned, lm.engine.trainable)
        assert again("a") == lm("a")


def test_predictors_that_shared_an_lm_share_it_again(policy):
    again = cloudpickle.loads(cloudpickle.dumps(student_of(policy)))
    assert again.first.lm is again.second.lm


def test_a_retired_version_or_a_policy_that_is_gone_leaves_an_lm_without_weights(policy, tiny_model):
    lm = policy.lm_at(policy.publish())
    written = pickle.dumps(lm)
    policy.restore(0, None)
    del lm
    gc.collect()
    policy.retire_all_but(())
    assert isinstance(pickle.loads(written).engine, DetachedEngine)


def test_a_pickle_holds_no_history_key_or_weights(scripted, tiny_model):
    policy = scripted(answer, api_key="planted-key")
    policy.lm("planted-prompt")
    written = pickle.dumps(policy.lm)
    assert b"planted" not in written
    assert len(written) < 1000


ELSEWHERE = """
import asyncio, sys
import dspy
from fst_optimizer.errors import UserError

program = dspy.load(sys.argv[1], allow_pickle=True)
print(program.first.lm, program.detailed_results.result["method"])
for ask in (lambda: program(question="q"), lambda: asyncio.run(program.first.lm.acall("a"))):
    try:
        ask()
    except UserError as error:
        print(error)
program.deepcopy()
program.save("state.json")
"""


def test_a_program_saved_whole_says_in_another_process_how_to_get_its_weights(compiled, policy, tmp_path):
    compiled.save(tmp_path / "saved", save_program=True)
    assert b"secret" not in (tmp_path / "saved" / "program.pkl").read_bytes()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "saved")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version = compiled.first.lm.version
    shown, sync, coroutine = done.stdout.strip().splitlines()
    assert shown == f"PolicyLM('model', version={version}, stays, without its weights) fst"
    assert sync == coroutine
    assert "call program.set_lm(policy.lm), or attach those of its run with fst_optimizer.load(run_dir" in sync
    assert "api_key" not in (tmp_path / "state.json").read_text()


def detached(lm):
    return pickle.loads(pickle.dumps(lm).replace(lm.engine.policy.key.encode(), b"0" * 32))


def test_an_lm_without_weights_is_replaced_by_set_lm_and_by_load(policy, compiled, tmp_path):
    from fst_optimizer import load

    lost = Program()
    lost.set_lm(detached(compiled.first.lm))
    with pytest.raises(UserError, match="none of the student's LMs is a policy"):
        optimizer(tmp_path / "other").compile(lost, trainset=TRAIN, valset=VAL)
    loaded = load(tmp_path / "run", program=lost, model=policy.source)
    try:
        assert isinstance(loaded.first.lm("a", max_tokens=2)[0], str)
    finally:
        loaded.first.lm.engine.policy.close()
    lost.set_lm(policy.lm)
    assert lost(question="q").answer in ("right", "wrong")


# --- Options in a compile --------------------------------------------------------------------------------------------


class Shaped(Program):
    """Asks for what a policy does not have, where only a run finds it, and hides the error."""

    def forward(self, question):
        try:
            return super().forward(question=self.first(question=question, config={"top_p": 0.9}).middle)
        except Exception:
            return dspy.Prediction(middle="m", answer="a")


def test_an_option_that_a_policy_does_not_have_ends_the_compile_with_its_name(policy, tmp_path):
    program = Shaped()
    program.set_lm(policy.lm)
    with pytest.raises(UserError, match=r"^top_p is 0\.9: a policy samples from the model's own distribution"):
        optimizer(tmp_path / "run").compile(program, trainset=TRAIN, valset=VAL)


def test_options_of_a_predictor_are_checked_before_anything_runs(policy, tmp_path):
    program = student_of(policy)
    program.second.config = {"frequency_penalty": 0.5}
    with pytest.raises(UserError, match=r"^the student's predictor 'second': frequency_penalty is 0\.5: "):
        optimizer(tmp_path / "run").compile(program, trainset=TRAIN, valset=VAL)
    assert (policy.engine.requests, (tmp_path / "run").exists()) == ([], False)


def test_a_closed_policy_is_refused(policy, tmp_path):
    policy.close()
    with pytest.raises(UserError, match=r"is closed: make a new Policy, and call student.set_lm"):
        optimizer(tmp_path / "run").compile(student_of(policy), trainset=TRAIN, valset=VAL)


# --- Arguments of Policy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: give a whole number of at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5: give a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan: give a number of at least 0"),
        ({"seed": -1}, "seed is -1: give a whole number of at least 0"),
        ({"max_batch": 0}, "max_batch is 0: give a whole number of at least 1"),
        ({"lora": {"rnk": 4}}, "config: unknown key 'lora.rnk'; did you mean 'rank'"),
        ({"lora": {"rank": 0}}, "lora.rank is 0: give a whole number of at least 1"),
        ({"lora": 16}, "lora is 16: give a LoraConfig, or a dictionary of its settings"),
        ({"engine": "vllm", "vllm": {"devises": "1"}}, "config: unknown key 'vllm.devises'; did you mean 'devices'"),
        ({"dtype": "int8"}, "dtype is 'int8': choose one of auto"),
        ({"dtype": "float31"}, "dtype is 'float31': did you mean 'float32'"),
        ({"dtype": 16}, "dtype is 16: give a string"),
        ({"device": "gpu"}, "device is 'gpu': torch cannot use it here"),
        ({"device": "cuda:99"}, "device is 'cuda:99': torch cannot use it here"),
        ({"adapter": "nowhere"}, "adapter is 'nowhere': no adapter_config.json there"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(tiny_model, monkeypatch, arguments, said):
    monkeypatch.setattr("fst_optimizer.policy.policy.load_tokenizer", lambda *_: pytest.fail("it began to load"))
    with pytest.raises(UserError) as refused:
        Policy(tiny_model, **arguments)
    assert str(refused.value).startswith(said)


def test_the_adapters_shape_may_be_a_dictionary(tiny_model):
    with Policy(tiny_model, lora={"rank": 4, "target_modules": ["q_proj"]}) as policy:
        assert (policy.lora.rank, policy.rank) == (4, 4)


def test_a_policy_is_closed_at_the_end_of_its_block_and_may_be_closed_again(scripted):
    with scripted(answer) as policy:
        assert policy.lm("a")
    policy.close()
    assert policy.closed and policy.engine.closed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "openai/gpt-5.2",
            r"reflection_lm is 'openai/gpt-5\.2': give an LM, reflection_lm=dspy\.LM\('openai/gpt-5\.2'\)",
        ),
        (print, r"reflection_lm is <built-in function print>: give a dspy\.LM, or None"),
    ],
)
def test_a_reflection_lm_that_is_none_is_refused(given, said):
    from fst_optimizer import FST

    with pytest.raises(UserError, match=said):
        FST(lambda example, prediction: 1.0, reflection_lm=given)
