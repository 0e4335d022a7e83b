import math

import pytest

from fst_optimizer.store.metrics import MetricsLog, read_metrics
from fst_optimizer.types import Outcome, Rollout, RolloutCounts


def line(log, kind="eval", **fields):
    log.line(kind, cycle=1, step=6, policy_version=5, rollouts=RolloutCounts(fast=2), **fields)


def test_every_line_has_the_shared_fields(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    line(log, score=0.5)
    (data,) = read_metrics(log.path)
    assert data.pop("time_s") >= 0
    assert data == {
        "kind": "eval",
        "cycle": 1,
        "step": 6,
        "policy_version": 5,
        "rollouts": {"fast": 2, "slow": 0, "eval": 0, "reused": 0},
        "score": 0.5,
    }


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_and_does_not_stop_the_run(tmp_path, number):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    line(log, kind="step", grad_norm=number, lr=0.1)
    (data,) = read_metrics(log.path)
    assert data["grad_norm"] is None
    assert data["lr"] == 0.1


def test_callbacks_hear_lines_and_progress_and_the_file_only_lines(tmp_path):
    heard = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [heard.append])
    count = log.counting("slow", 8)
    for index, score in enumerate((0.5, 1.0)):
        count(Rollout("c", f"train-{index}", index, 0, Outcome.OK, score))
    line(log)
    assert [data["kind"] for data in heard] == ["progress", "progress", "eval"]
    assert heard[1] == {"kind": "progress", "phase": "slow", "done": 2, "total": 8, "example": "train-1", "score": 1.0}
    assert [data["kind"] for data in read_metrics(log.path)] == ["eval"]


def test_the_clock_goes_on_across_a_resume(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.resume(0, 1000.0)
    assert log.time_s >= 1000


def test_a_cut_forgets_what_came_after_a_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.size() == 0
    line(log, score=1.0)
    size = log.size()
    line(log, score=2.0)
    log.resume(size, 0.0)
    line(log, score=3.0)
    assert [data["score"] for data in read_metrics(log.path)] == [1.0, 3.0]


def test_cutting_a_log_that_was_never_written_leaves_it_empty(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.resume(0, 0.0)
    assert read_metrics(log.path) == []
