"""A callback that ends a run."""

import pytest

from fst_optimizer.errors import StopRun
from fst_optimizer.store.files import read_json
from helpers.run_check import assert_as_designed
from helpers.toy import TRAIN, VAL, answer, optimizer, student_of


def stopping_at(kind, number):
    heard = []

    def callback(event):
        heard.append(event["kind"])
        if event["kind"] == kind and heard.count(kind) == number:
            raise StopRun

    return callback


@pytest.mark.parametrize(("kind", "number", "steps"), [("step", 1, 1), ("step", 3, 3), ("fast", 2, 2)])
def test_a_run_ends_after_the_phase_in_which_a_callback_raised(scripted, tmp_path, lines, kind, number, steps):
    run = tmp_path / "run"
    compiled = optimizer(run, callbacks=[stopping_at(kind, number)]).compile(
        student_of(scripted(answer)), trainset=TRAIN, valset=VAL
    )
    told = lines(run / "metrics.jsonl")
    assert told[-1]["kind"] == kind and sum(line["kind"] == kind for line in told) == number
    result = read_json(run / "result.json")
    assert (result["ended"], result["steps"]) == ("stopped", steps)
    assert result["rollouts"] == told[-1]["rollouts"]
    assert result["val_score_after"] == max(line["score"] for line in told if line["kind"] == "eval")
    assert compiled.detailed_results.best.score == result["val_score_after"]
    if sum(line["kind"] == "eval" for line in told) > 1:
        assert_as_designed(run)


def test_a_run_may_be_ended_before_anything_is_learned(scripted, tmp_path):
    run = tmp_path / "run"
    optimizer(run, callbacks=[stopping_at("eval", 1)]).compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    result = read_json(run / "result.json")
    assert (result["ended"], result["steps"], result["rollouts"]["fast"]) == ("stopped", 0, 0)


def test_other_callbacks_still_hear_the_line(scripted, tmp_path):
    heard = []
    optimizer(tmp_path / "run", callbacks=[stopping_at("step", 1), heard.append]).compile(
        student_of(scripted(answer)), trainset=TRAIN, valset=VAL
    )
    assert [event["kind"] for event in heard if event["kind"] != "progress"][-1] == "step"
