"""The displays: where each is used, what a terminal and a notebook get, and that none of them can end a run."""

import builtins
import io
import os
import pty
import subprocess
import sys
import types

import pytest
from rich.console import Console
from rich.live import Live

from fst_optimizer.progress.display import Display, Guarded, NotebookDisplay, TerminalDisplay, shown
from helpers.recorded import events
from helpers.toy import TRAIN, VAL, answer, optimizer, student_of

RESULT = {
    "task": "Program",
    "method": "fst",
    "seed": 0,
    "val_score_before": 0.25,
    "val_score_after": 0.75,
    "test_score_before": None,
    "test_score_after": None,
    "rollouts": {"fast": 24, "slow": 128, "eval": 64, "reused": 20},
    "steps": 2,
    "cycles": 1,
    "reflection_calls": 6,
    "cost_usd": 0.0,
    "wall_s": 61.0,
    "kl_to_base": 0.0123,
    "policy_version": 2,
    "candidate": {"first": "Sort. <b>bold</b> [red]not markup[/red] \x1b[2J"},
    "ended": "done",
}


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal():
    return Console(file=Terminal(), width=100, force_terminal=True)


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook's front end is sent: one list a call of `display`, its first content and every update."""
    outputs = []

    class Handle:
        def __init__(self, data):
            self.contents = [data]
            outputs.append(self.contents)

        def update(self, data, raw):
            assert raw
            self.contents.append(data)

    def display(data, raw, display_id):
        assert raw and display_id
        return Handle(data)

    class ZMQInteractiveShell:
        pass

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return outputs


# -- which one -------------------------------------------------------------------------------------------------------


def kind_of(*arguments, **options):
    with shown(*arguments, **options) as display:
        return type(display.display)


def test_a_terminal_gets_a_live_display_and_a_pipe_lines(terminal):
    assert kind_of(console=terminal) is TerminalDisplay
    assert kind_of(console=Console(file=io.StringIO())) is Display


def test_a_log_file_is_no_terminal_whatever_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    assert console.is_terminal  # rich's opinion
    assert kind_of(console=console) is Display


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert kind_of(console=Console(file=Terminal(), force_terminal=True)) is Display


def test_a_notebook_gets_an_output_of_its_own(notebook):
    assert kind_of() is NotebookDisplay
    assert len(notebook) == 1


def test_beside_another_live_display_there_are_lines(terminal):
    with Live("theirs", console=terminal):
        assert kind_of(console=terminal) is Display
        # Their display has taken stderr: another console does not draw over it either.
        assert kind_of(console=Console(file=Terminal(), force_terminal=True)) is Display


# -- a terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_lines_numbers_and_at_the_end_the_table(terminal):
    with shown(console=terminal) as display:
        for event in events():
            display(event)
        numbers = display.display.render().plain
        display.conclude(RESULT, "files     runs/a")
    text = terminal.file.getvalue()
    assert numbers.splitlines()[2].startswith("reward 0.854   frontier 1   validation 0.908 (first 0.113, best 0.912)")
    assert "[0:29] after cycle 1 of 5: val score 0.847" in text
    assert "0.7500" in text and "files     runs/a" in text
    assert text.index("after cycle 5 of 5") < text.index("0.7500")


def test_a_terminal_gets_its_cursor_back_after_ctrl_c(terminal):
    with pytest.raises(KeyboardInterrupt), shown(console=terminal) as display:
        display(next(events()))
        raise KeyboardInterrupt
    text = terminal.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_what_a_model_wrote_is_text(terminal):
    hostile = {"kind": "accepted", "time_s": 1.0, "cycle": 0, "score": 1.0, "parent_score": 0.0}
    texts = {"before": {"a": "x"}, "after": {"a": "x \x1b[2J\x1b]0;owned\x07 [blink]y[/blink]"}}
    with shown(console=terminal) as display:
        display({**hostile, **texts})
        display({"kind": "waiting", "seconds": 1.0, "text": "\x1b[2J[red]"})
        assert display.display.render().plain == "starting vLLM, 0:01: \\x1b[2J[red]"
        display.conclude(RESULT, "end")
    text = terminal.file.getvalue()
    assert "\x1b[2J" not in text and "\x07" not in text
    assert "\\x1b[2J" in text and "[blink]y[/blink]" in text and "[red]not markup[/red]" in " ".join(text.split())


# -- a notebook ------------------------------------------------------------------------------------------------------


def test_a_notebook_has_one_output_that_ends_with_the_table(notebook):
    with shown() as display:
        display.say("run directory: runs/a")
        for event in events():
            display(event)
        display.conclude(RESULT, "files     runs/a")
    (contents,) = notebook
    last = contents[-1]["text/plain"]
    assert len(contents) < 20  # 2201 events, drawn twice a second
    assert last.startswith("run directory: runs/a\n[0:02] before the first cycle: val score 0.113")
    assert "cycle 5 of 5   step" not in last and last.rstrip().endswith("files     runs/a")


def test_a_notebook_shows_text_as_text(notebook):
    with shown() as display:
        display.conclude(RESULT, "end")
    html = notebook[0][-1]["text/html"]
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "<b>" not in html and "\x1b" not in html


def test_a_notebook_without_its_module_gets_lines(notebook, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with shown() as display:
        display.say("run directory: runs/a")
    assert capsys.readouterr().err == "run directory: runs/a\n"


# -- a display that fails --------------------------------------------------------------------------------------------


class Broken(Display):
    """Fails at everything."""

    def write(self, line):
        raise BrokenPipeError("gone")

    def close(self):
        raise RuntimeError("not that either")


def test_a_display_that_fails_is_off_after_one_warning(caplog):
    display = Guarded(Broken())
    for _ in range(3):
        display.say("a line")
    display.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the display of progress failed and is off (BrokenPipeError: gone)"
    ]


def test_an_event_that_cannot_be_read_does_not_end_a_run(caplog):
    with shown(console=Console(file=io.StringIO())) as display:
        display({"kind": "step"})
        display({"kind": "step"})
    assert len(caplog.records) == 1


def test_a_closed_stderr_does_not_end_a_run(scripted, tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    fst = optimizer(tmp_path / "run", values={"method": "rl", "budget.max_cycles": 1}, progress=True)
    compiled = fst.compile(student_of(scripted(answer)), trainset=TRAIN, valset=VAL)
    assert compiled.detailed_results.result["ended"] == "done"


def sometimes(prompt, request):
    """A third of the answers cannot be parsed."""
    return "unparseable" if request.seed % 3 == 0 else answer(prompt, request)


# -- FST -------------------------------------------------------------------------------------------------------------


def test_from_python_a_run_shows_itself_from_its_directory_to_its_table(scripted, tmp_path, capsys):
    student = student_of(scripted(answer))
    capsys.readouterr()  # the model was loaded
    fst = optimizer(tmp_path / "run", values={"budget.max_cycles": 1, "run.dry_run": True})
    result = fst.compile(student, trainset=TRAIN, valset=VAL).detailed_results.result
    out, err = capsys.readouterr()
    assert out == ""
    first, *lines = err.splitlines()
    assert first == f"run directory: {tmp_path / 'run'}"
    assert lines[0].startswith("plan: ")
    assert lines[1].startswith("[0:0") and "before the first cycle: val score" in lines[1]
    assert any("new instruction for" in line for line in lines) and any("{+Mind the gap.+}" in line for line in lines)
    assert f"{result['val_score_after']:.4f}" in err
    model = student.first.lm.engine.policy.source
    said = f"fst_optimizer.load({str(tmp_path / 'run')!r}, program=Program(), model={model!r})"
    assert lines[-1] == f"use it    program = {said}"


def test_without_progress_nothing_is_shown_but_warnings(scripted, tmp_path, capsys, caplog):
    values = {"budget.max_cycles": 1, "monitors.format_max": 0.0, "monitors.steps": 1, "method": "rl"}
    student = student_of(scripted(sometimes))
    capsys.readouterr()  # the model was loaded
    fst = optimizer(tmp_path / "run", values=values, progress=False)
    fst.compile(student, trainset=TRAIN, valset=VAL)
    out, err = capsys.readouterr()
    assert out == err == ""
    assert "could not be parsed" in caplog.text


def test_a_resumed_run_begins_with_the_scores_that_it_had(scripted, tmp_path, capsys):
    class Stop(Exception):
        pass

    def stop(event):
        if event["kind"] == "step" and event["step"] == 2:
            raise Stop

    run, policy = tmp_path / "run", scripted(answer)
    with pytest.raises(Stop):
        optimizer(run, callbacks=[stop]).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    before = capsys.readouterr().err
    first = before.partition("val score ")[2][:5]
    heard = []
    fst = optimizer(run, resume=True, callbacks=[heard.append])
    result = fst.compile(student_of(policy), trainset=TRAIN, valset=VAL).detailed_results.result
    line = next(line for line in capsys.readouterr().err.splitlines() if "] resumed" in line)
    assert "resumed in cycle 1 of 2, after step 1: validation " in line and f"(first {first}, best " in line
    assert heard[0]["val_score_before"] == result["val_score_before"] == pytest.approx(float(first), abs=6e-4)
    assert heard[0]["best"] <= result["val_score_after"] and heard[0]["rollouts"]["slow"] == 8


def test_a_run_tells_of_its_failures_and_tokens(scripted, tmp_path):
    heard = []

    fst = optimizer(tmp_path / "run", callbacks=[heard.append], progress=False)
    result = fst.compile(student_of(scripted(sometimes)), trainset=TRAIN, valset=VAL).detailed_results.result
    start = next(event for event in heard if event["kind"] == "start")  # has what the dry run spent
    ended = [event for event in heard if event["kind"] == "progress"]
    assert start["tokens"] + sum(event["tokens"] for event in ended) == result["tokens"] > 0
    spent = start["rollouts"]["eval"] + len(ended)
    assert spent == sum(result["rollouts"][name] for name in ("fast", "slow", "eval"))
    assert {event["outcome"] for event in ended} == {"ok", "parse_error"}


SCRIPT = """
import sys
sys.path.insert(0, "tests")
from fst_optimizer import Policy
from fst_optimizer.testing import ScriptedEngine
from helpers.toy import TRAIN, VAL, answer, optimizer, student_of
policy = Policy(sys.argv[1], engine=lambda policy: ScriptedEngine(policy, answer))
optimizer(sys.argv[2], values={"budget.max_cycles": 1}).compile(student_of(policy), trainset=TRAIN, valset=VAL)
print("the program's own")
"""


def test_in_a_real_terminal_the_cursor_comes_back_and_stdout_stays_clean(tiny_model, tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env, text=True) as process:
        os.close(theirs)
        shown = bytearray()
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            shown += chunk
        out = process.stdout.read()
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0 and out == "the program's own\n"
    assert "run directory: " in text and "before the first cycle" in text and "getting ready" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "program=Program(), model=" in text.splitlines()[-1]
