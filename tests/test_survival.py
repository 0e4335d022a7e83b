"""What a run must live through besides faults: caps in odd places, other programs on its policy, odd texts."""

import math
import re
import shutil

import dspy
import pytest

from fst_optimizer import UserError
from fst_optimizer.errors import StorageError
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.keys import without_secrets
from fst_optimizer.store.files import RunFiles, read_json
from helpers.toy import (
    TRAIN,
    VAL,
    Program,
    Reflection,
    answer,
    assert_same_run,
    optimizer,
    run_toy,
    said,
    student_of,
    untimed_metrics,
)

pytestmark = pytest.mark.slow  # dozens of whole runs

INTERRUPTED = KeyboardInterrupt()


def stopped(run_dir, policy, *, place="trainer.step", after=1, **options):
    """A run that is interrupted at a place."""
    with inject(place, raising(INTERRUPTED), after=after), pytest.raises(KeyboardInterrupt):
        run_toy(run_dir, policy, **options)


def test_a_second_cap_in_the_last_evaluation_ends_the_run_in_order(scripted, tmp_path):
    values = {"method": "rl", "budget.max_steps": 1}
    tokens = run_toy(tmp_path / "whole", scripted(answer), values=values)["tokens"]
    result = run_toy(tmp_path / "run", scripted(answer), values=values | {"budget.max_tokens": tokens - 1})
    assert (result["ended"], result["cap"], result["steps"]) == ("budget", "max_steps", 1)


@pytest.mark.parametrize("method", ["rl", "gepa", "sequential", "once"])
@pytest.mark.parametrize("passage", [2, 7, 12])
def test_every_method_resumes_to_the_same(scripted, tmp_path, method, passage):
    values = {"method": method, "budget.max_rollouts": 60, "budget.max_cycles": 3}
    run_toy(tmp_path / "whole", scripted(answer), values=values)
    stopped(tmp_path / "run", scripted(answer), place="rollout.end", after=passage, values=values)
    run_toy(tmp_path / "run", scripted(answer), values=values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_rollouts_that_come_twice_in_one_phase_resume_to_the_same(scripted, tmp_path):
    values = {"fast.temperature": 1.0, "eval.temperature": 1.0}
    run_toy(tmp_path / "whole", scripted(answer), values=values)
    stopped(tmp_path / "run", scripted(answer), place="rollout.end", after=30, values=values)
    run_toy(tmp_path / "run", scripted(answer), values=values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_another_programs_weights_are_not_taken_for_the_own_ones(scripted, tmp_path):
    from fst_optimizer.testing import move_adapter

    stopped(tmp_path / "run", scripted(answer), after=3)
    version = read_json(tmp_path / "run" / "state.json")["state"]["policy_version"]
    policy = scripted(answer)
    for seed in range(version):
        move_adapter(policy, seed=seed)
        policy.publish()
    pinned = policy.lm_at(version)
    with pytest.raises(UserError, match=rf"version {version} is in use by another program.*make a new Policy"):
        run_toy(tmp_path / "run", policy, resume=True)
    del pinned
    assert run_toy(tmp_path / "run", policy, resume=True)["ended"] == "done"


def test_a_teachers_version_keeps_its_number_over_a_resume(scripted, tmp_path):
    def run(run_dir, policy, **options):
        from fst_optimizer.testing import move_adapter

        move_adapter(policy, seed=9)
        taught = policy.publish()
        teacher, student = Program(), Program()
        teacher.set_lm(policy.lm_at(taught))
        student.set_lm(policy.lm_at(0))
        fst = optimizer(run_dir, **options)
        return fst.compile(student, trainset=TRAIN, valset=VAL, teacher=teacher)

    run(tmp_path / "whole", scripted(answer))
    with inject("rollout.end", raising(INTERRUPTED), after=8), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", scripted(answer))
    again = scripted(answer)
    run(tmp_path / "run", again, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert again.engine.published == list(range(1, len(again.engine.published) + 1))


def test_a_damaged_newest_adapter_costs_computing_and_no_rollout(scripted, tmp_path, caplog):
    run_toy(tmp_path / "whole", scripted(answer))
    policy = scripted(answer)
    stopped(tmp_path / "run", policy, place="files.commit", after=8)
    files = RunFiles(tmp_path / "run")
    state = read_json(files.state)["state"]
    path = files.policy(state["policy_version"]) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    ended = []
    with inject("rollout.end", lambda rollout: ended.append(rollout) or rollout):
        run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert "adapter_model.safetensors is damaged or missing" in caplog.text
    one, other = untimed_metrics(tmp_path / "whole"), untimed_metrics(tmp_path / "run")
    assert [line["rollouts"] for line in one] == [line["rollouts"] for line in other]
    counts = one[-1]["rollouts"]
    assert len(ended) < counts["fast"] + counts["slow"] + counts["eval"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data.replace(b'"score"', b'"scorf"', 1)],
)
def test_a_damaged_metrics_file_is_told_at_the_resume_and_in_the_result(scripted, tmp_path, caplog, damage):
    stopped(tmp_path / "run", scripted(answer), place="files.commit", after=6)
    path = tmp_path / "run" / "metrics.jsonl"
    assert damage(path.read_bytes()) != path.read_bytes()
    path.write_bytes(damage(path.read_bytes()))
    result = run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert result["ended"] == "done"
    (alarm,) = [text for text in result["alarms"] if "metrics.jsonl is damaged" in text]
    assert "the run goes on" in alarm and alarm in caplog.text
    assert untimed_metrics(tmp_path / "run")


def test_checkpoints_and_journals_of_another_run_are_told_and_not_used(scripted, tmp_path, caplog):
    run_toy(tmp_path / "whole", scripted(answer))
    stopped(tmp_path / "run", scripted(answer), after=2)
    stopped(tmp_path / "other", scripted(answer), after=3)
    for folder in ("checkpoint", "journal", "policy"):
        shutil.copytree(tmp_path / "other" / folder, tmp_path / "run" / folder, dirs_exist_ok=True)
    run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert "of another run" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_does_not_end_a_run_in_the_journal(scripted, tmp_path, bad):
    from fst_optimizer.engines.base import Generation

    def broken(generation):
        return Generation(generation.completion_ids, (bad, *generation.logprobs[1:]), generation.finish_reason)

    with inject("engine.answer", broken, after=10, times=1):
        result = run_toy(tmp_path / "run", scripted(answer))
    assert result["ended"] == "done"


def test_a_text_that_is_no_unicode_is_written_down_and_read_back(scripted, tmp_path):
    def odd(example, prediction):
        return dspy.Prediction(score=0.5, feedback="no such file: \udcff")

    stopped(tmp_path / "run", scripted(answer), place="rollout.end", after=20, metric=odd)
    assert run_toy(tmp_path / "run", scripted(answer), metric=odd, resume=True)["ended"] == "done"


def test_what_a_program_hands_on_may_hold_itself_or_have_no_text(scripted, tmp_path):
    class Mute:
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    class MuteError(Exception):
        __str__ = __repr__ = Mute.__str__

    class Odd(Program):
        def forward(self, question):
            found = super().forward(question)
            itself = [Mute()]
            itself.append(itself)
            dspy.settings.trace.append((self.first, {"question": itself}, {"middle": Mute()}))
            if found.middle == "wrong":
                raise MuteError
            return found

    program = Odd()
    program.set_lm(scripted(answer).lm)
    fst = optimizer(tmp_path / "run", values={"budget.max_cycles": 1})
    assert fst.compile(program, trainset=TRAIN, valset=VAL).detailed_results.result["ended"] == "done"


def test_a_full_disk_at_a_reflection_stops_the_run_and_is_no_failed_proposal(scripted, tmp_path):
    full = []

    def when_reflecting(text):
        full.append(True)
        return text

    def write(path):
        if full and path.parent.name == "journal":
            raise OSError(28, "No space left on device")
        return path

    with (
        inject("reflection.answer", when_reflecting),
        inject("files.write", write),
        pytest.raises(StorageError, match="No space left on device"),
    ):
        run_toy(tmp_path / "run", scripted(answer), reflection_lm=Reflection())
    run_toy(tmp_path / "run", scripted(answer), reflection_lm=Reflection(), resume=True)


def test_a_cap_is_looked_at_before_each_reflection(scripted, tmp_path):
    class Dear(Reflection):
        def __call__(self, prompt=None, messages=None, **kwargs):
            self.calls += 1
            self.history.append({"cost": 1.0, "response": None})
            return [f"```\nuseless {self.calls}\n```"]

    values = {"method": "gepa", "budget.max_cost_usd": 1.5, "fast.max_proposals": 8, "fast.max_rollouts": 200}
    result = run_toy(tmp_path / "run", scripted(lambda *_: said(False)), reflection_lm=Dear(), values=values)
    assert result["cost_usd"] <= 2.0
    assert (result["ended"], result["cap"]) == ("budget", "max_cost_usd")


def test_with_changes_that_are_allowed_old_rollouts_are_not_used(scripted, tmp_path):
    stopped(tmp_path / "run", scripted(answer))
    other = [dspy.Example(question=f"new{i}", answer="right").with_inputs("question") for i in range(len(TRAIN))]
    policy = scripted(answer)
    with pytest.raises(UserError, match=r"data.train.sha256.*--allow-changes"):
        optimizer(tmp_path / "run", resume=True).compile(student_of(policy), trainset=other, valset=VAL)
    fst = optimizer(tmp_path / "run", resume=True, allow_changes=True)
    fst.compile(student_of(policy), trainset=other, valset=VAL)
    asked = [policy.engine.prompt_text(request) for request in policy.engine.requests]
    assert not any(re.search(r"\bq\d\b", text) for text in asked)
    assert any("data.train.sha256" in change for change in read_json(tmp_path / "run" / "config.json")["changes"])


@pytest.mark.parametrize("change", [{"trainset": "labels"}, {"reflection_lm": Reflection()}])
def test_other_labels_or_another_reflection_lm_are_changes(scripted, tmp_path, change):
    stopped(tmp_path / "run", scripted(answer))
    labels = [dspy.Example(question=f"q{i}", answer="left").with_inputs("question") for i in range(len(TRAIN))]
    options = {} if "trainset" in change else change
    fst = optimizer(tmp_path / "run", resume=True, **options)
    with pytest.raises(UserError, match=r"data.train.sha256|program.reflection_lm"):
        fst.compile(student_of(scripted(answer)), trainset=labels if not options else TRAIN, valset=VAL)


def test_a_method_that_begins_to_train_begins_with_a_fresh_optimizer(scripted, tmp_path):
    stopped(tmp_path / "run", scripted(answer), place="files.commit", after=4, values={"method": "gepa"})
    policy = scripted(answer)
    fst = optimizer(tmp_path / "run", resume=True, allow_changes=True)
    program = fst.compile(student_of(policy), trainset=TRAIN, valset=VAL)
    assert program.detailed_results.result["steps"] > 0


def test_a_full_disk_at_the_end_leaves_a_run_that_can_be_resumed(scripted, tmp_path):
    def write(path):
        if path.name == "program.json":
            raise OSError(28, "No space left on device")
        return path

    with inject("files.write", write), pytest.raises(StorageError, match=r"program\.json could not be written"):
        run_toy(tmp_path / "run", scripted(answer))
    assert run_toy(tmp_path / "run", scripted(answer), resume=True)["ended"] == "done"
    assert not list((tmp_path / "run").glob(".program*"))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("GET https://x/y?key=AIzaSyA1234567890abcdefghijk&v=1 failed", "GET https://x/y?key=***&v=1 failed"),
        ("HTTP 401 {'api_key': 'abcdef123456'}", "HTTP 401 {'api_key': '***'}"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("Incorrect API key provided: sk-proj-abcdefghijkl123", "Incorrect API key provided: ***"),
        ("the environment's planted-value-42 is here", "the environment's *** is here"),
        ("KeyError: 'answer' and token counts: 17", "KeyError: 'answer' and token counts: 17"),
    ],
)
def test_keys_are_taken_out_of_errors(monkeypatch, text, left):
    monkeypatch.setenv("PLANTED_API_KEY", "planted-value-42")
    assert without_secrets(text) == left


def test_a_key_in_a_tools_error_reaches_no_file(scripted, tmp_path):
    class Leaking(Program):
        def forward(self, question):
            if int(question[1:]) % 2 == 0:  # in every rollout, it would stop the run
                return super().forward(question)
            raise ConnectionError("GET https://api.example/v1?api_key=planted-in-an-address failed")

    policy = scripted(answer)
    program = Leaking()
    program.set_lm(policy.lm)
    optimizer(tmp_path / "run", values={"budget.max_cycles": 1}).compile(program, trainset=TRAIN, valset=VAL)
    text = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*.json*"))
    assert "api_key=***" in text
    assert "planted-in-an-address" not in text
