"""Whatever an argument, `--set` or a file of settings is given, it is taken as it is or refused by name."""

import inspect
import json
import math
import os

import pytest

import fst_optimizer
from fst_optimizer import FST, Policy, UserError
from fst_optimizer.config.overrides import assignments, read_settings, settled
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.testing import ScriptedEngine
from fst_optimizer.tuning import api
from helpers.settings import SETTINGS, full_name
from helpers.toy import SHORT, TRAIN, VAL, Program, answer, metric, optimizer, student_of

ODD = (
    *(None, 0, -1, 1, 1.5, -0.0, 5e-324, 1e308, 1e10, 2**31, 2**63, 10**400, -(10**400), math.nan, math.inf, -math.inf),
    *(True, False, "8", "", "no", "none", "q_proj", "../x", "a\0b", "\udcff", "x" * 5000, b"8", 1j, object(), object),
    *([], [1], [0.9, math.nan], ["q_proj"], {}, {"a": 1}, {1: 2}, {"a": [1, math.inf]}, (), ({},), {1, 2}, len),
)
TRUTHS = {"track_stats", "resume", "allow_changes", "progress", "student_follows", "trust_remote_code"}
ITS_OWN = {"program": "student", "nonsense": "nonsense"}
"""Arguments that an error calls otherwise."""


class Begun(Exception):
    """All arguments were taken."""


def begin(*_, **__):
    raise Begun


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def policy(scripted):
    return scripted(answer)


def taken(name, make):
    """The odd values that `make(value)` takes; it refuses the others by `name`."""
    found = []
    for value in ODD:
        try:
            make(value)
        except UserError as error:
            assert name in str(error), error
            assert any(sign in str(error) for sign in (": ", "; ")), error
        except Begun:
            found.append(value)
        else:
            found.append(value)
    if name in TRUTHS:
        assert all(value is True or value is False for value in found)
    return found


@pytest.mark.parametrize("name", inspect.signature(FST).parameters)
def test_arguments_of_the_optimizer(name):
    rest = {"run_dir": "x"} if name == "resume" else {}
    taken(name, lambda value: FST(**{"metric": metric, **rest, name: value}))


@pytest.mark.parametrize("name", [*list(inspect.signature(FST.compile).parameters)[1:-1], "nonsense"])
def test_arguments_of_compile(policy, monkeypatch, name):
    monkeypatch.setattr(FST, "_run", begin)
    fst = optimizer("runs/new", settings=SHORT, progress=False)
    given = {"student": student_of(policy), "trainset": TRAIN, "valset": VAL}
    taken(name, lambda value: fst.compile(**given | {name: value}))


@pytest.mark.parametrize("name", inspect.signature(Policy).parameters)
def test_arguments_of_a_policy(tiny_model, monkeypatch, name):
    monkeypatch.setattr("fst_optimizer.policy.policy.load_tokenizer", begin)
    given = {"model": tiny_model, "engine": lambda policy: ScriptedEngine(policy, answer)}
    values = taken(name, lambda value: Policy(**given | {name: value}))
    assert name != "api_key" or all(value is None or isinstance(value, str) for value in values)


@pytest.mark.parametrize("name", inspect.signature(api.tune).parameters)
def test_arguments_of_a_study(policy, monkeypatch, name):
    monkeypatch.setattr(api, "_search", begin)
    given = {"program": student_of(policy), "metric": metric, "trainset": TRAIN, "valset": VAL, "trials": 1}
    taken(ITS_OWN.get(name, name), lambda value: api.tune(**given | {name: value}))


@pytest.mark.parametrize("name", ["run_dir", "program", "task", "model", "engine"])
def test_arguments_of_load(policy, tiny_model, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    optimizer(run, settings=SHORT, progress=False).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    monkeypatch.setattr("fst_optimizer.policy.policy.load_tokenizer", begin)
    given = {"run_dir": run, "model": tiny_model, **({} if name == "task" else {"program": Program()})}
    named = {"run_dir": "run directory"} if name == "run_dir" else {}

    def make(value):
        try:
            fst_optimizer.load(**given | {name: value})
        except UserError as error:
            assert name in str(error) or named.get(name, name) in str(error) or "is a run of" in str(error), error

    taken(name, make)


# -- --set and files -----------------------------------------------------------------------------------------------

TEXTS = (
    *(
        "",
        "null",
        "true",
        "no",
        "0",
        "-1",
        "1",
        "1.5",
        "1e10",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "9" * 5000,
        "q_proj",
    ),
    *(
        '"8"',
        "[]",
        "[1]",
        "[NaN]",
        '["q_proj"]',
        "{}",
        '{"a": 1}',
        '{"a": 1, "a": 2}',
        "[" * 3000,
        "\udcff",
        "\0",
        "=1",
    ),
)


def given_alone(name, value):
    """`{"section": {"name": value}}`."""
    section, dot, leaf = name.partition(".")
    return {section: {leaf: value}} if dot else {section: value}


@pytest.mark.parametrize(("section", "setting"), SETTINGS, ids=[full_name(*one) for one in SETTINGS])
def test_odd_texts_after_set_and_odd_files(section, setting, tmp_path):
    name = full_name(section, setting)
    path = tmp_path / "settings.json"
    for text in TEXTS:
        try:
            settled(FSTConfig(), assignments([f"{name}={text}"]))
        except UserError as error:
            assert name in str(error)
        whole = json.dumps(given_alone(name, "VALUE")).replace('"VALUE"', text)
        path.write_bytes(whole.encode("utf-8", "surrogatepass"))
        try:
            settled(FSTConfig(), read_settings(path))
        except UserError as error:
            assert name in str(error) or str(path) in str(error)
    for value in ODD:
        try:
            settled(FSTConfig(), {name: value})
        except UserError as error:
            assert name in str(error)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"train": {"lr": 1, "lr": 2}}', "'lr' is there twice; keep one"),
        ('{"seed": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds list, not an object"),
        ("", "not readable as JSON"),
        ('{"config": {}, "policy": 5}', "policy is 5: give an object of settings"),
        ('{"config": {}, "policy": {"lora": 5}}', "lora"),
        ('{"config": {}, "policy": {"vllm": [1]}}', "vllm"),
        ('{"train": 5}', "setting 'train' is a section"),
        ('{"predictors": 5, "predictors.a": "both"}', "predictors"),
        ('{"format": [], "config": {}}', "format"),
        ('{"": 1}', "unknown setting ''"),
        ('{"fast": {"": 1}}', "unknown setting 'fast.'"),
    ],
)
def test_files_of_settings_that_are_none(tmp_path, text, named):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        settled(FSTConfig(), read_settings(path))
    assert named in str(caught.value)


def test_a_folder_a_missing_and_a_closed_file_are_no_settings(tmp_path):
    closed = tmp_path / "closed.json"
    closed.write_text("{}")
    closed.chmod(0)
    cases = {
        tmp_path: "is a folder; give a JSON file",
        tmp_path / "none": "no such file",
        closed / "in": "no such file",
    }
    if os.geteuid():
        cases[closed] = "cannot be read (Permission denied); give access"
    for path, named in cases.items():
        with pytest.raises(UserError) as caught:
            read_settings(path)
        assert named in str(caught.value)


def test_an_open_section_is_set_as_a_whole_or_by_entries():
    for pairs in (["predictors=5", "predictors.a=both"], ["budget.prices=5", "budget.prices.x=1"]):
        with pytest.raises(UserError, match=pairs[0].partition("=")[0]):
            settled(FSTConfig(), assignments(pairs))
