"""Every fault in docs/faults.md, let in at its place: what the user sees, what is kept, and that a resume mends it."""

import errno
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fst_optimizer import Policy, UserError
from fst_optimizer.engines.base import Generation
from fst_optimizer.errors import EngineDied, EngineError, MetricError, StorageError
from fst_optimizer.failpoints import PLACES, failpoint, inject, raising
from fst_optimizer.store.files import RunFiles, locked, read_json
from fst_optimizer.tasks import load_task
from helpers.toy import RULE, Reflection, answer, assert_same_run, optimizer, run_toy, said, untimed_metrics

DOCS = Path(__file__).parents[1] / "docs" / "faults.md"


def garbage(generation):
    return Generation(tuple(range(10, 20)), (-1.0,) * 10, "stop")


def cut(generation):
    return Generation(generation.completion_ids[:3], generation.logprobs[:3], "length")


def slow(value):
    time.sleep(1.2)
    return value


@pytest.fixture
def whole(scripted, tmp_path):
    """The run that nothing disturbs, made when asked for."""

    def make(**options):
        run_toy(tmp_path / "whole", scripted(answer), **options)
        return tmp_path / "whole"

    return make


# -- faults that stop the run: the last checkpoint stands, and a resume comes to the same ---------------------------

STOPS = {
    "the engine dies": ("engine.answer", raising(EngineDied("gone")), 40, EngineDied, "gone"),
    "the engine fails every request": ("engine.answer", raising(EngineError("busy")), 8, EngineError, "failed all"),
    "the metric raises": ("metric.answer", raising(KeyError("gold")), 40, MetricError, r"raised on example \w+-\d+"),
    "the metric returns NaN": ("metric.answer", lambda _: float("nan"), 40, UserError, "return a finite number"),
    "the disk is full": (
        *("files.write", raising(OSError(errno.ENOSPC, "No space left on device")), 60),
        *(StorageError, "No space left on device.*make room"),
    ),
    "the folder becomes read-only": (
        *("files.write", raising(OSError(errno.EROFS, "Read-only file system")), 90),
        *(StorageError, "Read-only file system.*give access"),
    ),
    "Ctrl-C or SIGTERM": ("policy.publish", raising(KeyboardInterrupt()), 2, KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize("fault", STOPS)
def test_a_fault_that_stops_the_run_loses_nothing(whole, scripted, tmp_path, fault):
    place, effect, after, error, words = STOPS[fault]
    reference = whole()
    with inject(place, effect, after=after), pytest.raises(error, match=words):
        run_toy(tmp_path / "run", scripted(answer))
    run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert_same_run(reference, tmp_path / "run")


# -- faults that are data: the run goes on, and says what happened ----------------------------------------------------

DATA = {
    "the engine fails a request": ("engine.answer", raising(EngineError("busy")), "engine_error"),
    "the engine times out": ("engine.answer", slow, "timeout"),
    "the engine returns garbage": ("engine.answer", garbage, "parse_error"),
    "the engine truncates": ("engine.answer", cut, "truncated"),
    "the metric hangs": ("metric.answer", slow, "timeout"),
}


@pytest.mark.parametrize("fault", DATA)
def test_a_fault_of_one_rollout_is_written_down_and_the_run_goes_on(scripted, tmp_path, fault):
    place, effect, outcome = DATA[fault]
    values = {"rollout.timeout_s": 0.6, "budget.max_cycles": 1}
    seen = []
    watching = inject("rollout.end", lambda rollout: seen.append(rollout) or rollout)
    after = 12 if place == "engine.answer" else 6  # in the first slow step, behind the evaluation of the start
    with watching, inject(place, effect, after=after, times=3):
        result = run_toy(tmp_path / "run", scripted(answer), values=values | {"method": "rl"})
    assert [rollout.outcome for rollout in seen].count(outcome) in (2, 3)  # two may have hit one rollout's two calls
    assert sum(line["failed"] for line in untimed_metrics(tmp_path / "run") if "failed" in line) in (2, 3)
    assert (result["ended"], result["steps"]) == ("done", 2)


REFLECTION = {
    "the reflection LM is rate-limited": (
        raising(ConnectionError("429")),
        "reflection LM failed: ConnectionError: 429",
    ),
    "the reflection LM refuses": (lambda _: "I cannot help with that.", "ended: max_proposals"),
    "the reflection LM answers nothing": (lambda _: "", "answered nothing"),
    "the reflection LM repeats the text": (lambda _: "Answer.", "repeated the instruction"),
}


@pytest.mark.parametrize("fault", REFLECTION)
def test_a_fault_of_the_reflection_lm_costs_that_proposal(scripted, tmp_path, caplog, fault):
    effect, note = REFLECTION[fault]
    with inject("reflection.answer", effect, times=2):
        result = run_toy(tmp_path / "run", scripted(answer), reflection_lm=Reflection())
    first = read_json(tmp_path / "run" / "population" / "cycle-000000.json")
    assert any(note in found for found in first["notes"])
    if fault == "the reflection LM refuses":
        assert first["notes"] == [note]  # its text was tried like any other
    fast = [line for line in untimed_metrics(tmp_path / "run") if line["kind"] == "fast"]
    assert [line["proposals"] for line in fast] == [2, 2]
    warned = [record for record in caplog.records if "reflection LM failed" in record.getMessage()]
    # Where it happens and once more at the end, whatever the number of failures.
    assert len([record for record in warned if record.levelname == "WARNING"]) == 2 * fault.endswith("rate-limited")
    assert not any(RULE in text for candidate in first["candidates"] for text in candidate["texts"].values())
    second = read_json(tmp_path / "run" / "population" / "cycle-000001.json")
    assert second["notes"] == ["ended: max_proposals"]  # as if nothing had been
    assert (result["ended"], result["reflection_calls"]) == ("done", 4)


def test_memory_that_runs_out_in_a_slow_step_halves_the_microbatch(whole, scripted, tmp_path, caplog):
    reference = whole(values={"train.microbatch_tokens": 2048})
    with inject("trainer.step", raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), times=1):
        run_toy(tmp_path / "run", scripted(answer), values={"train.microbatch_tokens": 2048})
    assert "going on with train.microbatch_tokens=1024" in caplog.text
    steps = [[line for line in untimed_metrics(run) if line["kind"] == "step"] for run in (reference, tmp_path / "run")]
    assert [line["updated"] for line in steps[0]] == [line["updated"] for line in steps[1]]
    assert steps[0][0]["grad_norm"] == pytest.approx(steps[1][0]["grad_norm"], rel=1e-4)


def test_a_folder_that_is_read_only_is_refused_before_anything_is_spent(scripted, tmp_path):
    policy = scripted(answer)
    read_only = inject("files.write", raising(OSError(errno.EROFS, "Read-only file system")))
    with read_only, pytest.raises(UserError, match=r"run_dir .* cannot be written .*Read-only.*another directory"):
        run_toy(tmp_path / "run", policy)
    assert policy.engine.requests == []


def test_a_checkpoint_that_is_corrupted_costs_one_phase_and_no_rollout(whole, scripted, tmp_path, caplog):
    reference = whole()
    policy = scripted(answer)
    with inject("trainer.step", raising(KeyboardInterrupt()), after=2), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", policy)
    files = RunFiles(tmp_path / "run")
    newest = files.root / read_json(files.state)["checkpoint"] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    again = scripted(answer)
    run_toy(tmp_path / "run", again, resume=True)
    assert "is damaged or missing; going on from checkpoint/0000" in caplog.text
    assert_same_run(reference, tmp_path / "run")
    assert len(policy.engine.requests) + len(again.engine.requests) == requests_of(scripted, tmp_path)


def requests_of(scripted, tmp_path):
    """Completions that the undisturbed run asks for."""
    policy = scripted(answer)
    run_toy(tmp_path / "counted", policy)
    return len(policy.engine.requests)


def test_a_second_process_in_the_same_directory_is_refused(scripted, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(UserError, match="being written by another process"):
        run_toy(tmp_path / "run", scripted(answer))


# -- what was paid for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passage", [2, 6, 11, 17, 25, 33, 41, 50])
def test_no_rollout_that_ended_is_paid_for_twice(whole, scripted, tmp_path, passage):
    reference = whole()
    ended = []
    with inject("rollout.end", lambda rollout: ended.append(rollout) or rollout):
        with (
            inject("rollout.end", raising(KeyboardInterrupt()), after=passage, times=1),
            pytest.raises(KeyboardInterrupt),
        ):
            run_toy(tmp_path / "run", scripted(answer), values={"run.grace_s": 0})
        run_toy(tmp_path / "run", scripted(answer), values={"run.grace_s": 0}, resume=True)
    assert_same_run(reference, tmp_path / "run")
    counts = read_json(reference / "result.json")["rollouts"]
    in_flight = 4
    assert 0 <= len(ended) - counts["fast"] - counts["slow"] - counts["eval"] <= in_flight


@pytest.mark.slow
def test_the_in_process_engine_goes_on_with_the_same_batches_candidates_and_steps(tmp_path):
    """Really sampled and really trained: the letters model, on its own task."""
    task = load_task("programs/letters")
    values = {"budget.max_cycles": 1, "train.lr": 1e-3, "fast.anchor_size": 4}
    data = {"trainset": task.load("train", 8), "valset": task.load("val", 6)}

    def letters(run_dir, **options):
        policy = Policy(task.model(), max_tokens=48)
        program = task.build_program()
        program.set_lm(policy.lm)
        optimizer(run_dir, metric=task.metric, values=values, **options).compile(program, **data)
        policy.close()

    seen = {"whole": [], "run": []}
    for name, kept in seen.items():
        with inject("rollout.end", lambda rollout, kept=kept: kept.append(rollout) or rollout):
            if name == "run":
                with inject("trainer.step", raising(KeyboardInterrupt()), after=1), pytest.raises(KeyboardInterrupt):
                    letters(tmp_path / name)
            letters(tmp_path / name, resume=name == "run")

    def told(rollout):
        return (rollout.candidate_id, rollout.example_id, rollout.index, rollout.policy_version)

    assert sorted(map(told, seen["whole"])) == sorted(map(told, seen["run"]))  # each once, the killed step's too
    kept = ("kind", "cycle", "step", "policy_version", "rollouts", "candidate", "groups", "updated", "accepted")
    one, other = (
        [{name: line.get(name) for name in kept} for line in untimed_metrics(tmp_path / name)] for name in seen
    )
    assert one == other


def test_no_reflection_that_was_answered_is_paid_for_twice(scripted, tmp_path):
    reference = Reflection()
    run_toy(tmp_path / "whole", scripted(answer), reflection_lm=reference)
    one, two = Reflection(), Reflection()
    with inject("reflection.answer", raising(KeyboardInterrupt()), after=1), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer), reflection_lm=one)
    two.calls = 1  # its answers are numbered
    run_toy(tmp_path / "run", scripted(answer), reflection_lm=two, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert (one.calls, two.calls) == (2, reference.calls)


# -- monitors and early stop -----------------------------------------------------------------------------------------


def test_a_guard_that_pauses_leaves_a_checkpoint_and_a_resume_goes_on(whole, scripted, tmp_path):
    from fst_optimizer.errors import Paused

    loud = {"monitors.kl_max": 0.0, "monitors.kl": "pause"}
    reference = whole()
    with pytest.raises(Paused, match=r"monitor kl: the policy is .* nats a token away.*Resume to go on"):
        run_toy(tmp_path / "run", scripted(answer), values=loud)
    assert not (tmp_path / "run" / "result.json").exists()
    result = run_toy(tmp_path / "run", scripted(answer), values=loud, resume=True)
    assert result["alarms"][0].startswith("kl: ")
    assert untimed_metrics(reference) == untimed_metrics(tmp_path / "run")


def test_a_guard_that_warns_says_so_and_the_run_goes_on(scripted, tmp_path, caplog):
    result = run_toy(tmp_path / "run", scripted(answer), values={"monitors.kl_max": 0.0})
    assert "monitor kl: the policy is" in caplog.text
    assert (result["ended"], len(result["alarms"])) == ("done", 1)


def test_a_run_without_progress_stops_early(scripted, tmp_path):
    result = run_toy(
        tmp_path / "run",
        scripted(lambda *_: said(False)),
        values={"budget.patience": 2, "budget.max_cycles": 9},
    )
    assert (result["ended"], result["cap"], result["cycles"]) == ("stopped", None, 2)


# -- the seam itself, and the page ------------------------------------------------------------------------------------


def test_nothing_happens_at_a_place_unless_a_fault_is_let_in():
    value = object()
    assert failpoint("files.write", value) is value
    with inject("files.write", lambda one: one + 1, after=1, times=2):
        assert [failpoint("files.write", 0) for _ in range(5)] == [0, 1, 1, 0, 0]
        assert failpoint("metric.answer", 0) == 0
    assert failpoint("files.write", 0) == 0


def test_every_place_is_passed_by_a_run(scripted, tmp_path):
    passed = set()
    from contextlib import ExitStack

    with ExitStack() as stack:
        for place in PLACES:
            stack.enter_context(inject(place, lambda value, place=place: passed.add(place) or value))
        run_toy(tmp_path / "run", scripted(answer), reflection_lm=Reflection())
    assert passed == set(PLACES)


@pytest.mark.slow
def test_six_runs_that_are_killed_end_as_if_nothing_had_been(tmp_path):
    """Sixty are, in `make soak`. In a process of its own, since it forks."""
    script, out = Path(__file__).parent / "soak" / "kills.py", tmp_path / "kills.json"
    command = [sys.executable, script, "--kills", "6", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "all 6 runs ended as if nothing had been" in done.stdout
    rows = read_json(out)["rows"]
    assert len(rows) == 6 and sum(row["kills"] for row in rows) >= 4  # an instant may come after the end
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert read_json(out)["rows"] == rows and "undisturbed" not in again.stdout


ELSEWHERE = {
    "a provider tells no tokens": "tests/rollout/test_usage.py",
    "a run directory comes from somebody else": "tests/finished/test_hostile_run_dir.py",
    "`--run-dir` is somebody's folder": "tests/store/test_guard.py",
    "memory runs out in a slow step": test_memory_that_runs_out_in_a_slow_step_halves_the_microbatch,
    "the folder is read-only": test_a_folder_that_is_read_only_is_refused_before_anything_is_spent,
    "a checkpoint is corrupted": test_a_checkpoint_that_is_corrupted_costs_one_phase_and_no_rollout,
    "a small disk fills up": "tests/test_full_disk.py",
    "metrics.jsonl is damaged": "tests/store/test_metrics.py, tests/test_survival.py",
    "files of another run are copied in": "tests/run/test_checkpoint.py, tests/test_survival.py",
    "a finished run is changed": "tests/finished/test_verified.py",
    "a model lacks a tensor": "tests/model/test_load.py",
    "an adapter lacks a tensor": "tests/model/test_lora.py",
    "the program raises in every rollout": "tests/test_programs_that_fail.py, tests/rollout/test_crashes.py",
    "the program raises in some rollouts": "tests/test_programs_that_fail.py",
    "an argument or a setting is odd": "tests/config/test_odd_values.py, tests/config/test_odd_arguments.py",
    "no answer parses": "tests/test_programs_that_fail.py",
    "the program or a tool calls `sys.exit`": "tests/test_exits.py",
    "the metric calls `sys.exit`": "tests/test_exits.py",
    "the metric returns what cannot be read": "tests/rollout/test_metric.py",
    "an example cannot be written down": "tests/test_data.py",
    "a connection to a server breaks": "tests/engines/test_broken_connections.py",
    "a server answers what cannot be": "tests/engines/test_hostile_server.py",
    "a prompt names control tokens": "tests/model/test_chat.py, tests/rollout/test_collector.py",
    "a policy is dropped without `close`": "tests/engines/test_dropped.py",
    "a forked process calls the policy": "tests/engines/test_dropped.py",
    "temporary files are left": "tests/store/test_folders.py",
    "a second compile on one `Policy`": "tests/test_one_compile.py",
    "a second process": test_a_second_process_in_the_same_directory_is_refused,
    "SIGKILL of `fst lab` or `fst tune`": "tests/lab/test_launch.py, tests/tuning/test_tune_command.py",
    "SIGKILL": test_six_runs_that_are_killed_end_as_if_nothing_had_been,
}


def test_the_page_of_faults_has_a_row_for_each_and_no_other():
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", DOCS.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted({*STOPS, *DATA, *REFLECTION, *ELSEWHERE})
