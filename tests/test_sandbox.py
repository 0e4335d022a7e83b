"""The helper process: what it answers, when it is stopped, and that it starts again."""

import pytest

from fst_optimizer import sandbox


@pytest.fixture
def helper(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "def echo(value): print('noise'); return value\n"
        "def refuse(): raise ValueError('no such thing')\n"
        "def fail(): return {}['key']\n"
        "def spin():\n    while True: pass\n"
        "def grow(): return len('x' * 2**40)\n"
        "def seed(): return os.environ['PYTHONHASHSEED']\n"
        "def leave(): os._exit(3)\n"
    )
    made = sandbox.Sandbox(script)
    yield made
    made.close()


def test_the_helper_calls_functions_and_what_they_print_is_no_reply(helper):
    assert helper.call("echo", cpu_s=5, value={"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}
    assert helper.call("seed", cpu_s=5) == "0"


def test_a_mistake_is_a_value_error_and_a_fault_a_runtime_error(helper):
    with pytest.raises(ValueError, match="no such thing"):
        helper.call("refuse", cpu_s=5)
    with pytest.raises(RuntimeError, match="KeyError"):
        helper.call("fail", cpu_s=5)
    with pytest.raises(RuntimeError, match="MemoryError"):
        helper.call("grow", cpu_s=5)
    assert helper.call("echo", cpu_s=5, value=1) == 1


@pytest.mark.parametrize("function", ["spin", "leave"])
def test_a_helper_that_is_ended_is_started_again(helper, function):
    with pytest.raises(sandbox.Stopped, match=function):
        helper.call(function, cpu_s=0.2)
    assert helper.call("echo", cpu_s=5, value=1) == 1


def test_a_script_that_cannot_be_loaded_is_named(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_module_at_all")
    with pytest.raises(RuntimeError, match=r"broken\.py failed[\s\S]*no_such_module_at_all"):
        sandbox.Sandbox(script).call("echo", cpu_s=5)
