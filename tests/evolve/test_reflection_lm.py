from types import SimpleNamespace

import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflection_lm import POLICY, check_lm_name, name_of, recorded_name
from fst_optimizer.run import record
from helpers.toy import coin


@pytest.mark.parametrize("name", ["policy", "hosted_vllm/Qwen/Qwen3-8B", "ollama_chat/llama3:8b"])
def test_what_runs_on_own_machines_needs_no_key(name):
    check_lm_name(name)


@pytest.mark.parametrize(
    ("name", "variable"),
    [("openai/gpt-5.2", "OPENAI_API_KEY"), ("gpt-4o", "OPENAI_API_KEY"), ("anthropic/claude-x", "ANTHROPIC_API_KEY")],
)
def test_a_key_is_looked_for_in_the_environment(name, variable, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=f"reflection_lm is '{name}', and {variable} is not set: export it"):
        check_lm_name(name)
    monkeypatch.setenv(variable, "any")
    check_lm_name(name)


def test_a_provider_with_files_of_its_own_is_left_to_them(monkeypatch):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    check_lm_name("bedrock/anthropic.claude-x-v1:0")


@pytest.mark.parametrize("name", ["", " ", "openai/", "a b", "http://host/v1", "openai/x?n=1", "openai/x,api_base=y"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match="give a model's name as litellm has it"):
        check_lm_name(name)


@pytest.mark.parametrize(
    "name", ["openai/sk-abcdefghijklmnop", "openai/x:api_key=abcdefgh", "openai/x?key=1", "AIzaabcdefghijklmnopqrstu"]
)
def test_a_key_in_a_name_is_refused_and_not_repeated(name):
    with pytest.raises(UserError, match="looks like a key") as raised:
        check_lm_name(name)
    assert "abcdefgh" not in str(raised.value)


def test_the_policys_base_is_recorded_as_policy_and_others_by_their_name(scripted):
    policy, other = scripted(coin), scripted(coin)
    assert name_of(policy.base_lm, policy) == POLICY
    assert name_of(other.base_lm, policy) == f"hosted_vllm/{policy.name}"
    assert name_of(SimpleNamespace(model="openai/x"), policy) == "openai/x"
    assert name_of(None, policy) is None


def test_a_run_that_named_the_policys_base_by_its_folder_is_the_same_run():
    config = FSTConfig().to_dict()
    before = {"config": config, "policy": {"model": "folder/tiny"}, "program": {"reflection_lm": "hosted_vllm/tiny"}}
    now = {"config": config, "policy": {"model": "elsewhere/tiny"}, "program": {"reflection_lm": POLICY}}
    assert recorded_name(before) == POLICY
    assert record.changes(before, now) == []
    other = {**now, "program": {"reflection_lm": "openai/x"}}
    assert record.changes(before, other) == ["program.reflection_lm: 'policy' -> 'openai/x'"]
