"""Programs that fail, in every rollout or in some, or whose answers do not parse: what is said, counted and kept."""

import hashlib
import json
import sys
from pathlib import Path

import dspy
import pytest

from fst_optimizer import ProgramError, UserError
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.store.files import RunFiles, read_json
from helpers.fst import SMALL, fst
from helpers.run_check import assert_as_designed
from helpers.toy import (
    SHORT,
    TRAIN,
    VAL,
    Program,
    answer,
    assert_same_run,
    optimizer,
    run_toy,
    said,
    untimed_metrics,
)

UNREAD = "no answer of a whole batch could be parsed"


class Mistyped(Program):
    def forward(self, question):
        middle = self.first(question=question).midle
        return dspy.Prediction(middle=middle, answer=self.second(middle=middle).answer)


class Otherwise(Program):
    """Crashes in two places."""

    def forward(self, question):
        if int(question[1:]) % 2:
            raise KeyError(question)
        raise ValueError(question)


class Sometimes(Program):
    """Crashes on two of the four validation examples, and on half of the training examples."""

    def forward(self, question):
        if int(question[1:]) % 2:
            raise OSError(f"no such table: {question}")
        return super().forward(question)


def place_of(program, text):
    """`FILE:LINE in forward` of the line that has the text."""
    first = program.forward.__code__.co_firstlineno
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(n for n in range(first, len(lines)) if text in lines[n - 1])} in forward"


def run_of(program, run_dir, policy, **options):
    """The result of a run of this program instead of the toy's own."""
    program.set_lm(policy.lm)
    compiled = optimizer(run_dir, task="Program", **options).compile(program, trainset=TRAIN, valset=VAL)
    return compiled.detailed_results.result


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def whole(scripted, tmp_path):
    run_toy(tmp_path / "whole", scripted(answer))
    return tmp_path / "whole"


# -- one mistake, in every rollout ----------------------------------------------------------------------------------


def test_a_program_that_always_crashes_stops_in_its_first_batch(scripted, tmp_path, caplog):
    policy = scripted(answer)
    with pytest.raises(ProgramError) as raised:
        run_of(Mistyped(), tmp_path / "run", policy)
    text, place = str(raised.value), place_of(Mistyped, ".midle")
    assert text.startswith(f"the program raised AttributeError at {place} in all 4 rollouts of the first batch:\n")
    assert "middle = self.first(question=question).midle\n" in text
    again = f"--resume (in Python: run_dir={str(tmp_path / 'run')!r}, resume=True)."
    assert text.endswith(f"Correct the program and run the same command with {again}")
    assert len(text.splitlines()) < 16
    assert isinstance(raised.value, UserError) and isinstance(raised.value.__cause__, AttributeError)
    assert len(policy.engine.requests) == 4  # the first call of each validation example, and no more
    assert not (tmp_path / "run" / "result.json").exists()
    assert warnings_of(caplog) == []  # the error says it all


def test_once_it_is_corrected_a_resume_runs_those_rollouts_again(whole, scripted, tmp_path):
    with pytest.raises(ProgramError):
        run_of(Mistyped(), tmp_path / "run", scripted(answer))
    run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_the_correction_may_change_the_predictors(whole, scripted, tmp_path):
    wrong = Mistyped()
    wrong.first = dspy.Predict(dspy.Signature("questoin -> middle", "Answer it."))
    with pytest.raises(ProgramError):
        run_of(wrong, tmp_path / "run", scripted(answer))
    run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_run_with_rollouts_keeps_its_program(scripted, tmp_path):
    with inject("rollout.end", raising(KeyboardInterrupt()), after=2), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer))
    other = Program()
    other.first = dspy.Predict(dspy.Signature("question -> middle", "Answer it."))
    with pytest.raises(UserError, match=r"program\.instructions\.first: 'Answer\.' -> 'Answer it\.'"):
        run_of(other, tmp_path / "run", scripted(answer), resume=True)


def test_what_a_dry_run_spent_is_counted_after_a_resume_that_has_nothing_else(scripted, tmp_path):
    values = {"run.dry_run": True, "rollout.num_threads": 1, "run.grace_s": 0}
    run_toy(tmp_path / "whole", scripted(answer), values=values)
    with inject("rollout.end", raising(KeyboardInterrupt()), after=2), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer), values=values)
    run_toy(tmp_path / "run", scripted(answer), values=values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_crashes_are_not_kept_of_a_process_that_is_killed_in_its_first_batch(whole, scripted, tmp_path):
    with inject("rollout.end", raising(KeyboardInterrupt()), after=3), pytest.raises(KeyboardInterrupt):
        run_of(Mistyped(), tmp_path / "run", scripted(answer), values={"run.grace_s": 0})
    run_toy(tmp_path / "run", scripted(answer), resume=True, values={"run.grace_s": 0})
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("place", [("trainer.step", 1), ("rollout.end", 12), ("policy.publish", 2)])
def test_a_mistake_that_came_in_between_stops_the_resume_in_its_first_batch(whole, scripted, tmp_path, place):
    name, after = place
    with inject(name, raising(KeyboardInterrupt()), after=after), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer))
    ended = []
    with inject("rollout.end", lambda one: ended.append(one) or one), pytest.raises(ProgramError, match="in all"):
        run_of(Mistyped(), tmp_path / "run", scripted(answer), resume=True)
    assert {rollout.outcome for rollout in ended} == {"program_error"} and len(ended) <= 8
    assert read_json(RunFiles(tmp_path / "run").state)["state"]["tally"]["outcomes"].keys() == {"ok"}
    run_toy(tmp_path / "run", scripted(answer), resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_on_the_command_line_the_exit_code_is_1_and_a_resume_goes_on(tmp_path):
    task = tmp_path / "mine"
    task.mkdir()
    right = (
        "import dspy\n"
        "class Sorted(dspy.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.answer = dspy.Predict('letters -> answer')\n"
        "    def forward(self, letters):\n"
        "        return self.answer(letters=letters)\n"
        "def build_program(variant=None):\n"
        "    return Sorted()\n"
        "def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):\n"
        "    return sum(a == b for a, b in zip(prediction.answer, example.answer)) / len(example.answer)\n"
        "def load(split, size=None, seed=0, variant=None):\n"
        "    start = ('train', 'val', 'test').index(split) * 100\n"
        "    made = [format(start + n, 'b').replace('1', 'a ').replace('0', 'b ').strip() for n in range(size or 8)]\n"
        "    return [dspy.Example(letters=one, answer=one).with_inputs('letters') for one in made]\n"
        f"def model():\n    return {str(Path(__file__).parents[1] / 'programs' / 'letters' / 'model')!r}\n"
    )
    (task / "task.py").write_text(right.replace("self.answer(letters=letters)", "self.anwser(letters=letters)"))
    # The dry run would say so already.
    arguments = ("compile", task, "--run-dir", tmp_path / "run", *SMALL, "--set", "run.dry_run=false")
    stopped = fst(*arguments)
    assert stopped.exit_code == 1, stopped.output
    assert "failed: the program raised AttributeError at" in stopped.stderr and "with --resume" in stopped.stderr
    assert "self.anwser(letters=letters)" in stopped.stderr
    assert stopped.stderr.count("AttributeError: 'Sorted' object has no attribute 'anwser'") == 1
    assert not (tmp_path / "run" / "result.json").exists()
    (task / "task.py").write_text(right)
    for name in [name for name in sys.modules if name.endswith("task") and getattr(sys.modules[name], "Sorted", None)]:
        del sys.modules[name]
    resumed = fst(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert read_json(tmp_path / "run" / "result.json")["outcomes"].get("program_error") is None


# -- crashes that are data ------------------------------------------------------------------------------------------


def test_a_program_that_crashes_in_some_rollouts_is_told_of_once_and_counted(scripted, tmp_path, caplog):
    result = run_of(Sometimes(), tmp_path / "run", scripted(answer))
    told = [text for text in warnings_of(caplog) if text.startswith("the program raised")]
    (text,) = told
    assert "on example val-" in text and "OSError: no such table: q10" in text
    assert place_of(Sometimes, "raise OSError") in text
    assert [text for text in result["alarms"] if text.startswith("the program raised")] == told
    assert result["ended"] == "done"
    lines = untimed_metrics(tmp_path / "run")
    assert all({"outcomes", "first_error"} <= line.keys() for line in lines)
    first = lines[0]
    assert first["outcomes"] == {"ok": 2, "program_error": 2} and first["failed"] == 2
    error = {"outcome": "program_error", "text": "OSError: no such table: q101", "example": "val-1"}
    assert first["first_error"] == error == result["first_error"]
    for line in lines:
        if line["kind"] == "step":
            assert sum(line["outcomes"].values()) == 8 and line["outcomes"]["program_error"] == line["failed"]
    ran = sum(result["rollouts"][kind] for kind in ("fast", "slow", "eval"))
    assert sum(result["outcomes"].values()) == ran
    assert_as_designed(tmp_path / "run")


@pytest.mark.parametrize("passage", [1, 2, 9, 30])
def test_what_is_counted_is_the_same_after_a_resume(scripted, tmp_path, caplog, passage):
    values = {"run.grace_s": 0}
    run_of(Sometimes(), tmp_path / "whole", scripted(answer), values=values)
    caplog.clear()
    with inject("rollout.end", raising(KeyboardInterrupt()), after=passage), pytest.raises(KeyboardInterrupt):
        run_of(Sometimes(), tmp_path / "run", scripted(answer), values=values)
    result = run_of(Sometimes(), tmp_path / "run", scripted(answer), values=values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert sum(text.startswith("the program raised") for text in result["alarms"]) == 1


def test_a_resume_does_not_take_crashes_that_the_run_has_had_for_a_mistake(scripted, tmp_path):
    class LateCrash(Program):
        """Always crashes after the validation of the start."""

        def forward(self, question):
            prediction = super().forward(question)
            if int(question[1:]) < 100:
                raise OSError("the database is away")
            return prediction

    place = inject("policy.publish", raising(KeyboardInterrupt()), after=1)
    run = tmp_path / "run"
    values = {"rollout.program_error_reward": -1.0, "method": "rl"}
    with inject("rollout.end", raising(KeyboardInterrupt()), after=7), pytest.raises(KeyboardInterrupt):
        run_of(LateCrash(), run, scripted(answer), values=values)
    with place:
        result = run_of(LateCrash(), run, scripted(answer), values=values, resume=True)
    assert result["ended"] == "done"
    assert result["outcomes"]["program_error"] == result["rollouts"]["slow"]


def test_crashes_in_two_places_are_no_one_mistake_but_a_cycle_of_nothing_else_is_an_error(scripted, tmp_path, caplog):
    with pytest.raises(ProgramError, match=r"^not one of the \d+ rollouts of the first cycle ended well") as raised:
        run_of(Otherwise(), tmp_path / "run", scripted(answer))
    assert "the first: program_error on val-0: ValueError: q100" in str(raised.value)
    assert "correct the program" in str(raised.value)
    assert [line["step"] for line in untimed_metrics(tmp_path / "run") if line["kind"] == "step"] == [1, 2]
    assert len([text for text in warnings_of(caplog) if text.startswith("the program raised")]) == 1
    assert not (tmp_path / "run" / "result.json").exists()


# -- no answer parses -----------------------------------------------------------------------------------------------


def test_a_first_cycle_without_a_parsed_answer_is_an_error_that_says_what_helps(scripted, tmp_path, caplog):
    with pytest.raises(ProgramError) as raised:
        run_toy(tmp_path / "run", scripted(lambda *_: "nothing that parses"))
    text = str(raised.value)
    state = read_json(RunFiles(tmp_path / "run").state)["state"]
    assert (state["cycle"], state["step"]) == (0, 2)
    assert text.startswith("not one of the ") and "(parse_error " in text
    assert "the first: parse_error on val-0: The answer could not be parsed." in text
    assert all(words in text for words in ("policy.max_tokens", "signature", "prompt format", "BootstrapFinetune"))
    assert sum(warning.startswith(UNREAD) for warning in warnings_of(caplog)) == 1
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ProgramError, match="not one of the"):  # nothing more is spent, and it does not end as a success
        run_toy(tmp_path / "run", scripted(answer), resume=True)


def test_a_batch_without_a_parsed_answer_is_an_alarm_and_the_run_goes_on(scripted, tmp_path, caplog):
    def late(prompt, request):
        return said(request.seed % 2) if request.temperature else "nothing that parses"

    result = run_toy(tmp_path / "run", scripted(late))
    (alarm,) = [text for text in result["alarms"] if text.startswith(UNREAD)]
    assert alarm.startswith(f"{UNREAD} (4 rollouts; parse_error on val-0: The answer could not be parsed.")
    assert "policy.max_tokens" in alarm and "rollout.temperature" not in alarm
    assert result["ended"] == "done" and result["outcomes"]["ok"] > 0
    assert sum(text.startswith(UNREAD) for text in warnings_of(caplog)) == 1


def test_a_later_cycle_without_a_parsed_answer_is_no_error(scripted, tmp_path):
    heard = []
    policy = scripted(lambda prompt, request: answer(prompt, request) if len(heard) < 1 else "nothing that parses")

    def watch(event):
        if event["kind"] == "eval" and event["step"] == 2:
            heard.append(event)

    result = run_toy(tmp_path / "run", policy, callbacks=[watch])
    assert (result["ended"], result["cycles"]) == ("done", 2)
    assert result["outcomes"]["parse_error"] > 0


def test_a_callback_that_stops_the_run_stops_it_without_an_error(scripted, tmp_path):
    from fst_optimizer.errors import StopRun

    def stop(event):
        if event["kind"] == "step":
            raise StopRun

    result = run_toy(tmp_path / "run", scripted(lambda *_: "nothing that parses"), callbacks=[stop])
    assert result["ended"] == "stopped"


# -- the rest -------------------------------------------------------------------------------------------------------


def test_what_is_warned_of_in_the_last_test_evaluation_is_in_the_result(scripted, tmp_path):
    class CrashesOnTest(Program):
        def forward(self, question):
            if question == "q201" and ready:
                raise OSError("the database is away")
            return super().forward(question)

    ready = []

    def watch(event):
        if event["kind"] == "step":
            ready.append(event)

    program, policy = CrashesOnTest(), scripted(answer)
    program.set_lm(policy.lm)
    test = [dspy.Example(question=f"q{n}", answer="right").with_inputs("question") for n in (200, 201)]
    compiled = optimizer(tmp_path / "run", settings=SHORT, testset=test, callbacks=[watch]).compile(
        program, trainset=TRAIN, valset=VAL
    )
    result = compiled.detailed_results.result
    assert [text for text in result["alarms"] if "raised on example test-1" in text]
    assert result == read_json(tmp_path / "run" / "result.json")
    assert result["first_error"]["example"] == "test-1"


def test_a_run_of_a_version_that_did_not_count_goes_on(scripted, tmp_path):
    with inject("trainer.step", raising(KeyboardInterrupt()), after=1), pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", scripted(answer))
    files = RunFiles(tmp_path / "run")
    for path in [files.state, *files.manifests()]:
        content = read_json(path)
        for name in ("tally", "crashes"):
            del content["state"][name]
        for score in content["state"]["validated"].values():
            del score["tally"]
        del content["sha256"]
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content))
    result = run_toy(tmp_path / "run", scripted(lambda *_: "nothing that parses"), resume=True)
    assert result["ended"] == "done"  # of what ran before, nothing is known
    assert result["outcomes"]["parse_error"] > 0 and sum(result["outcomes"].values()) < sum(result["rollouts"].values())


def test_a_secret_in_what_a_program_raised_is_written_nowhere(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_API_KEY", "the-very-secret-words")

    class Leaks(Program):
        def forward(self, question):
            if question == "q101":
                raise OSError("401 for key the-very-secret-words")
            return super().forward(question)

    program, policy = Leaks(), scripted(answer)
    program.set_lm(policy.lm)
    result = run_of(program, tmp_path / "run", policy, settings=SHORT)
    assert result["first_error"]["text"] == "OSError: 401 for key ***"
    for path in (tmp_path / "run").rglob("*.json*"):
        assert "the-very-secret-words" not in path.read_text()
