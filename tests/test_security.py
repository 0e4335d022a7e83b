"""What must never be found in a run, and what must never be read."""

import json
import logging

import dspy
import pytest

from fst_optimizer import FST, EngineError, FSTConfig
from fst_optimizer.testing import chat_answer
from helpers.toy import SHORT, examples, metric, student_of

PLANTED = "sk-planted-0123456789abcdef"


def words(prompt, request):
    return chat_answer(middle="right" if request.seed % 2 else "wrong", answer="right")


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_network():
    """An API model whose address answers to nobody."""
    return dspy.LM("openai/gpt-5-mini", api_key=PLANTED, api_base="http://127.0.0.1:9/v1", cache=False, num_retries=0)


def test_a_run_whose_api_model_cannot_be_reached_does_not_tell_its_key(scripted, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    fst = FST(metric, config=FSTConfig.from_dict(SHORT), run_dir=tmp_path / "run")
    student = student_of(scripted(words), first=without_network())
    with pytest.raises(EngineError) as refused:
        fst.compile(student, trainset=examples(4), valset=examples(2, start=100))
    error = refused.value
    told = "".join(str(part) for part in (error, error.__cause__, caplog.text, *capfd.readouterr()))
    assert "gpt-5-mini" in told
    assert PLANTED not in told
    files = everything(tmp_path / "run")
    assert files and not [path for path, data in files.items() if PLANTED.encode() in data]


def test_a_finished_run_has_no_key_in_it(scripted, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FST_API_KEY", PLANTED)
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    reflector = without_network()  # fails at every proposal, which is recorded
    fst = FST(metric, config=FSTConfig.from_dict(SHORT), run_dir=tmp_path / "run", reflection_lm=reflector)
    better = fst.compile(student_of(scripted(words)), trainset=examples(4), valset=examples(2, start=100))
    better.save(tmp_path / "run" / "again.json")
    files = everything(tmp_path / "run")
    assert len(files) > 8
    assert not [path for path, data in files.items() if PLANTED.encode() in data]
    assert PLANTED not in caplog.text
    notes = json.loads((tmp_path / "run" / "population" / "cycle-000000.json").read_text())["notes"]
    assert any("reflection LM failed" in note for note in notes)


def test_only_json_and_safetensors_are_left_to_be_read_back(scripted, tmp_path):
    fst = FST(metric, config=FSTConfig.from_dict(SHORT), run_dir=tmp_path / "run")
    fst.compile(student_of(scripted(words)), trainset=examples(4), valset=examples(2, start=100))
    kinds = {path.suffix for path in everything(tmp_path / "run")}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".md", ""}
    for path, data in everything(tmp_path / "run").items():
        if path.suffix == ".json":
            json.loads(data)
