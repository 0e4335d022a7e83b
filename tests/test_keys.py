"""Keys of no known shape, planted wherever a key can be, are found in nothing that a run leaves, prints or raises."""

import json
import logging
import sys
from urllib.parse import quote

import dspy
import pytest

from fst_optimizer import FST, EngineError, FSTConfig, MetricError, Policy, UserError, VLLMConfig
from fst_optimizer.cli.console import this_command
from fst_optimizer.keys import keep_secret, keep_secrets_of, names_a_secret, without_keys, without_secrets
from fst_optimizer.logs import kept_warnings
from fst_optimizer.program.lms import keep_keys_of
from fst_optimizer.run.record import save_program
from fst_optimizer.testing import chat_answer
from fst_optimizer.text import shown
from fst_optimizer.tuning.storage import open_storage
from helpers.api import API as Server
from helpers.api import served
from helpers.toy import SHORT, examples, metric, student_of

KWARG, AWS, HEADER, USERINFO, VARIABLE, HIDDEN_JUDGE = (
    f"correct horse {number}! {word}" for number, word in enumerate(("api", "aws", "head", "user", "env", "judge"))
)
ALL = (KWARG, AWS, HEADER, USERINFO, VARIABLE, HIDDEN_JUDGE)
ECHO = " ".join(ALL)


def words(prompt, request):
    return chat_answer(middle="right" if request.seed % 2 else "wrong", answer="right")


def keyed(api, **settings):
    """An API model with a key in each place."""
    address = api.url.replace("://", f"://me:{quote(USERINFO, safe='')}@")
    headers = {"X-Gate": HEADER, "Content-Type": "application/json"}
    return api.lm(api_key=KWARG, aws_secret_access_key=AWS, extra_headers=headers, base_url=address, **settings)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", VARIABLE)


def found_in(*texts):
    return [key for key in ALL for text in texts if key in text or quote(key) in text]


def assert_untold(run_dir, caplog, capfd, *texts):
    files = [path.read_text(errors="replace") for path in run_dir.rglob("*") if path.is_file()]
    assert files and not found_in(*files)
    assert not found_in(*capfd.readouterr(), *texts)


def run(student, folder, metric=metric, **options):
    fst = FST(metric, config=FSTConfig.from_dict(SHORT), run_dir=folder, **options)
    return fst.compile(student, trainset=examples(4), valset=examples(2, start=100))


def test_a_metric_that_repeats_keys_tells_none(scripted, tmp_path, caplog, capfd):
    def leaking(example, prediction, trace=None):
        raise RuntimeError(f"refused with {ECHO}")

    with served(Server()) as api:
        student, judge = student_of(scripted(words)), dspy.LM("openai/judge", api_key=HIDDEN_JUDGE)
        student.unused = keyed(api)
        with pytest.raises(MetricError) as refused:
            run(student, tmp_path / "run", leaking, reflection_lm=judge)
    assert "refused with ***" in str(refused.value)
    assert_untold(tmp_path / "run", caplog, capfd, str(refused.value))


def test_feedback_tools_and_programs_that_repeat_keys_tell_none(scripted, tmp_path, caplog, capfd):
    def judged(example, prediction, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=float(prediction.answer == "right") / 2, feedback=f"Do not say {ECHO}.")

    with served(Server()) as api:
        student, judge = student_of(scripted(words)), dspy.LM("openai/judge", api_key=HIDDEN_JUDGE)
        student.unused = keyed(api)
        keep_keys_of(judge)
        plain = type(student).forward

        class Leaking(type(student)):
            def forward(self, question):
                if int(question[1:]) % 2:
                    raise ConnectionError(f"tool refused {ECHO}")
                return plain(self, question=f"{question} {ECHO}")

        student.__class__ = Leaking
        run(student, tmp_path / "run", judged)
    assert_untold(tmp_path / "run", caplog, capfd)
    assert "***" in (tmp_path / "run" / "result.json").read_text()


def test_a_server_that_repeats_what_it_was_sent_tells_none(scripted, tmp_path, caplog, capfd):
    with served(Server(status=401)) as api, pytest.raises(EngineError) as refused:
        run(student_of(scripted(words), first=keyed(api, cache=False)), tmp_path / "run")
    assert "failed all" in str(refused.value)
    assert_untold(tmp_path / "run", caplog, capfd, str(refused.value))


def test_a_reflection_lm_that_is_refused_leaves_no_key_in_the_notes(scripted, tmp_path, caplog, capfd):
    with served(Server(status=401)) as api:
        run(student_of(scripted(words)), tmp_path / "run", reflection_lm=keyed(api))
    assert_untold(tmp_path / "run", caplog, capfd)
    assert "reflection LM failed" in (tmp_path / "run" / "population" / "cycle-000000.json").read_text()


def test_a_saved_program_has_no_keys_headers_or_passwords(scripted, tmp_path):
    with served(Server()) as api:
        save_program(student_of(scripted(words), first=keyed(api)), tmp_path / "program.json")
    text = (tmp_path / "program.json").read_text()
    saved = json.loads(text)["first"]["lm"]
    assert not found_in(text) and not {"extra_headers", "aws_secret_access_key", "api_key"} & set(saved)
    assert saved["model"] == "openai/gpt-4o-mini" and "me:***@127.0.0.1" in saved["base_url"]


def test_warnings_and_values_in_errors_have_no_key_and_none_is_cut_in_half(capfd):
    keep_secret(KWARG)
    with kept_warnings() as kept:
        logging.getLogger("fst_optimizer.any").warning("it said %s", ECHO)
    assert "correct horse 0" not in "".join(kept.texts) + capfd.readouterr().err
    value = "a" * 190 + KWARG
    assert "correct" not in shown(value) and "correct" not in str(UserError(f"x is {value}"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--storage", "redis://:pw@host/0"], "fst --storage 'redis://:***@host/0'"),
        (["--storage", "postgres://me:p@s/s@host/db?sslpassword=q&x=1"], "sslpassword=***&x=1"),
        (["--set", "x.api_key=short", "--api-key", "v"], "fst --set 'x.api_key=***' --api-key '***'"),
        (["--set", "policy.max_tokens=51200000"], "fst --set policy.max_tokens=51200000"),
        (["--url", "https://token@host/v1?password=z"], "fst --url 'https://***@host/v1?password=***'"),
    ],
)
def test_a_reports_command_has_no_key(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", ["fst", *words])
    assert line in this_command() and "p@s" not in this_command()


def test_a_storage_that_cannot_be_reached_does_not_tell_its_keys():
    with pytest.raises(UserError, match="cannot be reached") as refused:
        open_storage(f"redis://:{quote(KWARG)}@127.0.0.1:9/0?password=another%20key%209")
    assert not found_in(str(refused.value)) and "another" not in str(refused.value)


@pytest.mark.parametrize("flag", ["--api-key=k", "--api_key=k", "--api-key", "--api-k=k", "--api_ke"])
def test_a_key_among_vllms_flags_is_refused_however_it_is_spelled(flag):
    with pytest.raises(UserError, match="give api_key instead"):
        VLLMConfig(flags=(flag, "k"))
    assert VLLMConfig(flags=("--ssl-keyfile=a.pem", "--api-server-count=2")).flags


def test_a_policy_server_that_repeats_its_key_tells_none(tiny_model):
    with served(Server(status=401)) as api, pytest.raises(UserError, match="cannot be used") as refused:
        Policy(tiny_model, engine="vllm", url=api.url.removesuffix("/v1"), api_key=KWARG)
    assert "refused: " in str(refused.value) and not found_in(str(refused.value))


def test_a_policy_servers_address_with_a_password_is_refused_without_it(tiny_model):
    with pytest.raises(UserError, match=r"url is 'http://me:\*\*\*@host/'.*api_key") as refused:
        Policy(tiny_model, engine="vllm", url=f"http://me:{quote(USERINFO)}@host/")
    assert not found_in(str(refused.value))


@pytest.mark.parametrize("word", ["none", "EMPTY", "x", "ollama", "not-needed", "no-key-required"])
def test_a_placeholder_is_no_key(word):
    keep_secrets_of({"api_key": word})
    assert without_keys(f"this is {word} of it") == f"this is {word} of it"


def test_names_of_keys():
    keys = "api_key apiKey AWS_SECRET_ACCESS_KEY azure_ad_token sslpassword X-Api-Key Authorization PGPASSWORD DB_PWD"
    others = "max_tokens max_completion_tokens tokenizer temperature author ssl_keyfile PWD prompt_cache_key"
    assert all(map(names_a_secret, keys.split())) and not any(map(names_a_secret, others.split()))


def test_a_database_url_of_the_environment_hides_its_password(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://me:hunter%20twelve@host/db")
    assert without_secrets("password hunter twelve is wrong") == "password *** is wrong"
