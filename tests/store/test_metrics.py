import math

import pytest

from fst_optimizer.store.files import checksum
from fst_optimizer.store.metrics import MetricsLog, mixed_groups, read_metrics
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
    assert heard[1].pop("time_s") >= heard[0]["time_s"] >= 0
    assert heard[1] == {
        "kind": "progress",
        "phase": "slow",
        "done": 2,
        "total": 8,
        "example": "train-1",
        "score": 1.0,
        "outcome": "ok",
        "tokens": 0,
    }
    assert [data["kind"] for data in read_metrics(log.path)] == ["eval"]


def test_the_clock_goes_on_across_a_resume(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.resume(*log.sync(), saved_s=900.0, elapsed_s=1000.0)
    assert log.time_s >= 1000


def test_a_cut_forgets_what_came_after_a_checkpoint(tmp_path, caplog):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.sync()[0] == 0
    line(log, score=1.0)
    saved, saved_s = log.sync(), log.time_s
    line(log, score=2.0)
    log.resume(*saved, saved_s=saved_s, elapsed_s=saved_s)
    line(log, score=3.0)
    assert [data["score"] for data in read_metrics(log.path)] == [1.0, 3.0]
    assert caplog.text == ""


def test_cutting_a_log_that_was_never_written_leaves_it_empty(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.resume(0, None, saved_s=0.0, elapsed_s=0.0)
    assert read_metrics(log.path) == []


def test_what_a_checkpoint_keeps_is_of_the_file_also_after_a_resume(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for score in (1.0, 2.0):
        line(log, score=score, note="half \udcff a character")
        size, sha256 = log.sync()
        assert (size, sha256) == (log.path.stat().st_size, checksum(log.path))
        log = MetricsLog(log.path)
        log.resume(size, sha256, saved_s=9.0, elapsed_s=9.0)


@pytest.fixture
def saved(tmp_path):
    """A log with three lines before a checkpoint, at 1, 2 and 3 seconds, and one after it; and the checkpoint."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for second in (1, 2, 3):
        log.resume(*log.sync(), saved_s=second, elapsed_s=second)
        line(log, score=float(second))
    size, sha256 = log.sync()
    log.resume(size, sha256, saved_s=3.5, elapsed_s=4)
    line(log, score=4.0)
    return log.path, {"size": size, "sha256": sha256, "saved_s": 3.5, "elapsed_s": 5.0}


def flip_digit(data):
    return data.replace(b'"score": 2.0', b'"score": 6.0')


DAMAGES = {
    "emptied": (lambda data: b"", []),
    "cut at a line": (lambda data: data[: data.index(b"\n") + 1], [1.0]),
    "cut inside a line": (lambda data: data[: data.index(b"\n") + 20], [1.0]),
    "a flipped bit that cannot be read": (lambda data: data.replace(b'"score": 2.0', b'"score"\xba 2.0'), [1.0, 3.0]),
    "a flipped bit in a number": (flip_digit, [1.0, 6.0, 3.0]),
    "zeros": (lambda data: bytes(len(data)), []),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_what_can_be_read_stays_and_the_run_goes_on(saved, damage, caplog):
    path, checkpoint = saved
    change, left = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    log = MetricsLog(path)
    log.resume(**checkpoint)
    assert f"metrics.jsonl is damaged: {log.sync()[0]} bytes of {checkpoint['size']} are left" in caplog.text
    assert log.sync() == (path.stat().st_size, checksum(path))
    line(log, score=5.0)
    assert [data["score"] for data in read_metrics(path)] == [*left, 5.0]


def test_a_run_that_was_killed_again_after_the_damage_has_no_line_twice(saved):
    path, checkpoint = saved
    path.write_bytes(path.read_bytes()[:30])
    for _ in range(2):
        log = MetricsLog(path)
        log.resume(**checkpoint)
        line(log, score=5.0)  # and killed, before the next checkpoint
    assert [data["score"] for data in read_metrics(path)] == [5.0]


def test_what_cannot_be_read_is_kept_beside(saved):
    path, checkpoint = saved
    path.write_bytes(path.read_bytes()[:30])
    MetricsLog(path).resume(**checkpoint)
    assert path.with_name("metrics.damaged.jsonl").read_bytes().startswith(b'{"kind"')


def test_a_file_that_is_gone_is_told(saved, caplog):
    path, checkpoint = saved
    path.unlink()
    MetricsLog(path).resume(**checkpoint)
    assert "metrics.jsonl is damaged: 0 bytes of" in caplog.text


def test_without_a_recorded_checksum_only_the_size_is_looked_at(saved, caplog):
    path, checkpoint = saved
    path.write_bytes(flip_digit(path.read_bytes()))
    MetricsLog(path).resume(**checkpoint | {"sha256": None})
    assert caplog.text == ""
    path.write_bytes(b"")
    MetricsLog(path).resume(**checkpoint | {"sha256": None})
    assert "metrics.jsonl is damaged" in caplog.text


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    line(log, note="one\u2028two\x85three")
    assert [data["note"] for data in read_metrics(log.path)] == ["one\u2028two\x85three"]


def test_a_group_is_mixed_where_its_rollouts_have_several_candidates():
    def rollout(candidate, example):
        return Rollout(candidate, example, 0, 1, Outcome.OK, 1.0)

    pairs = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "y"), ("a", "z"), ("b", "z"), ("c", "z")]
    assert mixed_groups([rollout(*pair) for pair in pairs]) == 2
    assert mixed_groups([]) == 0
