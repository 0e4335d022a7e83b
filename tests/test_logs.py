"""Warnings reach people: stderr by default, a configured logger instead, the run's result, and once more at its end."""

import logging
import subprocess
import sys

import dspy
import pytest

from fst_optimizer.errors import ReflectionError
from fst_optimizer.logs import kept_warnings
from fst_optimizer.store.files import read_json
from helpers.toy import answer, run_toy

SCRIPT = (
    "import logging, fst_optimizer\n{setup}\nlogging.getLogger('fst_optimizer.cycle').warning('the disk is slow')\n"
)


def stderr_of(setup=""):
    command = [sys.executable, "-c", SCRIPT.format(setup=setup)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_a_script_that_configures_nothing_sees_warnings_on_stderr():
    assert stderr_of() == "fst_optimizer: warning: the disk is slow\n"


def test_a_configured_root_logger_takes_over():
    assert stderr_of("logging.basicConfig(format='own %(message)s')") == "own the disk is slow\n"


def test_so_does_a_handler_of_the_packages_logger():
    setup = "logging.getLogger('fst_optimizer').addHandler(logging.StreamHandler())"
    assert stderr_of(setup) == "the disk is slow\n"


def test_kept_warnings_are_each_kept_once_and_without_keys():
    logger = logging.getLogger("fst_optimizer.anything")
    with kept_warnings() as kept:
        logger.warning("refused: api_key=sk-abcdefghijklmnop")
        logger.warning("refused: api_key=sk-abcdefghijklmnop")
        logger.warning("monitor kl: far away")
        logger.info("fine")
    logger.warning("later")
    assert list(kept.texts) == ["refused: api_key=***"]


class Refusing(dspy.LM):
    """A reflection LM behind a wrong key."""

    def __init__(self, error):
        super().__init__("openai/none")
        self.error = error

    def __call__(self, *_, **__):
        raise self.error


class AuthenticationError(Exception):
    status_code = 401


class RateLimitError(Exception):
    status_code = 429


def run_with(scripted, tmp_path, error, **values):
    return run_toy(tmp_path / "run", scripted(answer), reflection_lm=Refusing(error), values=values)


def test_a_reflection_lm_that_is_always_refused_stops_the_run_before_its_second_cycle(scripted, tmp_path, caplog):
    with pytest.raises(ReflectionError, match=r"AuthenticationError: wrong key; so did all .*on_reflection_failure"):
        run_with(scripted, tmp_path, AuthenticationError("wrong key"))
    state = read_json(tmp_path / "run" / "state.json")["state"]
    assert state["cycle"] == 1 and not (tmp_path / "run" / "result.json").exists()
    assert any("wrong key" in text for text in state["warnings"])
    assert sum("wrong key" in record.getMessage() for record in caplog.records) == 1  # told at its first failure


def test_or_the_run_goes_on_and_its_result_says_so(scripted, tmp_path):
    result = run_with(
        scripted, tmp_path, AuthenticationError("wrong key"), **{"fast.on_reflection_failure": "continue"}
    )
    assert result["ended"] == "done"
    assert any("AuthenticationError: wrong key" in text for text in result["alarms"])


def test_a_rate_limit_does_not_stop_it(scripted, tmp_path):
    assert run_with(scripted, tmp_path, RateLimitError("slow down"))["ended"] == "done"
