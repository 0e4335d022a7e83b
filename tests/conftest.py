import json
import os
import signal
import tempfile

# The models of the tests are tiny: more threads only get in each other's way, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "DSPY_CACHEDIR" not in os.environ:  # no test is answered by what another run has asked; workers of one run share it
    ANSWERS = tempfile.TemporaryDirectory(prefix="dspy-tests-")
    os.environ["DSPY_CACHEDIR"] = ANSWERS.name

import pytest

from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import ScriptedEngine, make_tiny_model
from helpers.servers import MISSING, installed_version, need_vllm

VLLM_FIXTURES = {"vllm_server", "vllm"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a random model with two layers and one token a byte."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def vllm_server(tiny_model):
    """A vLLM server on the tiny model, one for all tests that only attach to it."""
    need_vllm()
    from fst_optimizer import VLLMConfig, VLLMServer

    with VLLMServer(tiny_model, max_lora_rank=16, dtype="float32", config=VLLMConfig(max_live_versions=6)) as server:
        yield server


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what is started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that use a vLLM server are marked so, and run one after another; so do those of one file."""
    for item in items:
        if VLLM_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.vllm)
        server = item.get_closest_marker("vllm") is not None
        file = item.path.relative_to(item.config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group("vllm" if server else file))


def pytest_terminal_summary(terminalreporter):
    if installed_version() is None:
        terminalreporter.section("ATTENTION", red=True, bold=True)
        terminalreporter.write_line(MISSING, red=True, bold=True)


@pytest.fixture(autouse=True)
def policies_are_made_as_ever(monkeypatch):
    """Tasks that tests write for other processes put a policy of their own in place: here it ends with the test."""
    from fst_optimizer import task_run

    monkeypatch.setattr(task_run, "make_policy", task_run.make_policy)


@pytest.fixture
def scripted(tiny_model):
    """Makes a policy whose completions a function of (prompt text, request) writes."""
    made = []

    def make(answer, *, context_length=4096, **settings):
        policy = Policy(
            tiny_model, engine=lambda policy: ScriptedEngine(policy, answer, context_length=context_length), **settings
        )
        made.append(policy)
        return policy

    yield make
    for policy in made:
        policy.close()


@pytest.fixture
def lines():
    """Reads a file of one JSON object a line."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]
