"""Run directories, the reflection LM and refusals, as a person meets them on the command line."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fst_optimizer import task_run
from fst_optimizer.store.files import read_json, write_json
from fst_optimizer.tasks import run_name
from helpers.fst import LETTERS, SMALL, fst
from helpers.tiny_task import write_task

HELPERS = str(Path(__file__).parents[1])


class Reflects(BaseHTTPRequestHandler):
    """A server that answers every chat with an instruction, and counts."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.asked.append(json.loads(self.rfile.read(length)))
        message = {"role": "assistant", "content": f"```\nSay right, never wrong. ({len(self.server.asked)})\n```"}
        answer = {
            **{"id": "1", "object": "chat.completion", "created": 1, "model": "reflect"},
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def reflects(tmp_path):
    """What a process needs to ask such a server, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reflects)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HOSTED_VLLM_API_BASE": f"http://127.0.0.1:{server.server_port}/v1",
        "HOSTED_VLLM_API_KEY": "none",
        "DSPY_CACHEDIR": str(tmp_path / "cache"),
    }
    yield environment, server.asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(task_run, "make_policy", refuse)


def apart(*arguments, cwd=None, **environment):
    """A command in a process of its own: the tiny task changes how policies are made."""
    return subprocess.run(
        [sys.executable, "-m", "fst_optimizer.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def begun(folder, task, finished=False):
    """What a run of the task left."""
    write_json(
        folder / "config.json", {"task": task, "config": {}, "policy": {"model": "m"}, "data": {}, "versions": {}}
    )
    write_json(folder / ("result.json" if finished else "state.json"), {})


def test_the_version_is_told_without_torch_or_dspy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fst_optimizer.cli.main import app\n"
        "said = CliRunner().invoke(app, ['--version'])\n"
        "assert (said.exit_code, said.output) == (0, 'fst-optimizer 0.1.0\\n'), said.output\n"
        "assert not {'torch', 'dspy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("programs/letters", "letters"),
        ("programs/letters/:sort-rotate", "letters-sort-rotate"),
        ("my.tasks.sums:odd one", "sums-odd-one"),
        ("/somewhere/own", "own"),
    ],
)
def test_a_run_is_named_after_its_task_and_variant(task, name):
    assert run_name(task) == name


def test_a_taken_folder_is_refused_before_torch_or_dspy_is_imported(tmp_path):
    begun(tmp_path / "run", LETTERS, finished=True)
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fst_optimizer.cli.main import app\n"
        f"said = CliRunner().invoke(app, ['compile', {LETTERS!r}, '--run-dir', {str(tmp_path / 'run')!r}])\n"
        "assert said.exit_code == 2 and 'holds a finished run' in said.output, said.output\n"
        "assert not {'torch', 'dspy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resuming_a_mistyped_folder_names_the_run_that_is_there(tmp_path):
    begun(tmp_path / "first", LETTERS)
    said = fst("compile", LETTERS, "--run-dir", tmp_path / "frist", "--resume")
    assert said.exit_code == 2
    assert f"holds no run to resume (there is {tmp_path / 'first'}): leave --resume" in said.stderr
    assert not (tmp_path / "frist").exists()


def test_resume_and_eval_without_a_folder_name_those_of_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fst("compile", LETTERS, "--resume")
    assert said.exit_code == 2 and f"runs/ has no unfinished one of {LETTERS}" in said.stderr
    begun(tmp_path / "runs" / "other", "programs/other")
    begun(tmp_path / "runs" / "mine", LETTERS)
    said = fst("compile", LETTERS, "--resume")
    assert said.exit_code == 2 and f"the newest unfinished one of {LETTERS} is runs/mine" in said.stderr
    said = fst("eval", LETTERS)
    assert said.exit_code == 2 and f"runs/ has no finished one of {LETTERS}" in said.stderr
    begun(tmp_path / "runs" / "done", LETTERS, finished=True)
    said = fst("eval", LETTERS)
    assert said.exit_code == 2
    assert f"--run-dir is missing, the run to score: finished runs of {LETTERS} are runs/done" in said.stderr


LACKING = """
from fst_optimizer.tasks import load_task

letters = load_task("programs/letters:sort-rotate")
build_program, metric, model = letters.build_program, letters.metric, letters.model


def load(split, size=None, seed=0, variant=None):
    if split == {split!r}:
        {what}
    return letters.load(split, size, seed)
"""


@pytest.mark.parametrize(
    ("split", "what", "message"),
    [
        ("test", "raise ValueError('there is no test split')", "there is no test split"),
        ("test", "return []", "testset is empty: give examples"),
        ("val", "return []", "valset is empty"),
    ],
)
def test_missing_data_is_refused_before_a_model_is_loaded(tmp_path, no_model, split, what, message):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.py").write_text(LACKING.format(split=split, what=what))
    said = fst("compile", tmp_path / "task", "--run-dir", tmp_path / "run")
    assert said.exit_code == 2, said.output
    assert message in said.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reflection-lm", "openai/gpt-5.2"], "reflection_lm is 'openai/gpt-5.2', and OPENAI_API_KEY is not set"),
        (["--reflection-lm", "openai/sk-abcdefghijklmnop"], "reflection_lm holds what looks like a key"),
        (["--reflection-lm", "openai/x?api_key=abc"], "reflection_lm holds what looks like a key"),
        (["--reflection-lm", "openai/x?n=1"], "give a model's name as litellm has it"),
        (["--set", "predictors.nobody=train"], "predictors.nobody: the student has no such predictor"),
        (["--engine", "vlm"], "engine is 'vlm': did you mean 'vllm'?"),
        (["--set", "train.learning_rate=1"], "did you mean 'train.lr'?"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(tmp_path, no_model, monkeypatch, options, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said = fst("compile", LETTERS, "--run-dir", tmp_path / "run", *options)
    assert said.exit_code == 2, said.output
    assert message in said.stderr and "abcdefghijklmnop" not in said.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_reflection_lm_of_the_command_line_is_asked_recorded_and_kept_by_a_resume(tmp_path, tiny_model, reflects):
    environment, asked = reflects
    task, run = write_task(tmp_path / "task", tiny_model), tmp_path / "run"
    named = ("--reflection-lm", "hosted_vllm/reflect")
    said = apart("compile", task, "--run-dir", run, *named, **environment)
    assert said.returncode == 0, said.stderr
    result, calls = read_json(run / "result.json"), len(asked)
    assert calls and {one["model"] for one in asked} == {"reflect"}
    assert "Say right, never wrong." in str(asked[-1]["messages"])  # the metric's feedback
    assert result["reflection_calls"] > 0 and result["cost_usd"] == 0.0  # an own server costs nothing a token
    assert read_json(run / "config.json")["program"]["reflection_lm"] == "hosted_vllm/reflect"

    (run / "result.json").unlink()  # as if it had been killed at its end
    other = apart("compile", task, "--run-dir", run, "--resume", "--reflection-lm", "policy", **environment)
    assert other.returncode == 2 and "program.reflection_lm: 'hosted_vllm/reflect' -> 'policy'" in other.stderr
    again = apart("compile", task, "--run-dir", run, "--resume", **environment)
    assert again.returncode == 0, again.stderr
    assert read_json(run / "config.json")["program"]["reflection_lm"] == "hosted_vllm/reflect"


@pytest.mark.slow
def test_a_run_without_a_folder_gets_one_told_at_once_and_the_policys_base_may_reflect(tmp_path, tiny_model):
    task = write_task(tmp_path / "own", tiny_model)
    said = apart("compile", f"{task}:a", "--reflection-lm", "policy", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("own-a-2")
    assert f"runs/{run.name}" in said.stderr.splitlines()[0]
    assert read_json(run / "config.json")["program"]["reflection_lm"] == "policy"
    assert read_json(run / "result.json")["reflection_calls"] > 0


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_one_line_on_the_command_line(tmp_path, tiny_model):
    task, run = write_task(tmp_path / "task", tiny_model), tmp_path / "run"
    (task / "hang").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "fst_optimizer.cli.main", "compile", str(task), "--run-dir", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (task / "hanging").exists():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert stderr.count("go on") == 1 and f"--run-dir {run} --resume" in stderr


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {helpers!r})
from fst_optimizer import FST, FSTConfig, Policy
from fst_optimizer.testing import ScriptedEngine
from helpers import toy

calls = []


def metric(*arguments):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    if len(calls) == 21 and {twice}:
        os.kill(os.getpid(), signal.SIGINT)
    return toy.metric(*arguments)


policy = Policy({model!r}, engine=lambda policy: ScriptedEngine(policy, toy.answer))
config = FSTConfig.from_dict(toy.SETTINGS)
FST(metric, config=config, run_dir={run!r}).compile(toy.student_of(policy), trainset=toy.TRAIN, valset=toy.VAL)
"""


@pytest.mark.parametrize("twice", [False, True])
def test_a_script_that_is_interrupted_says_how_to_resume(tmp_path, tiny_model, twice):
    run = str(tmp_path / "run")
    code = SCRIPT.format(helpers=HELPERS, model=str(tiny_model), run=run, twice=twice)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGINT or "KeyboardInterrupt" in ran.stderr
    assert ran.stderr.count(f"interrupted; go on from here with FST(..., run_dir={run!r}, resume=True)") == 1
    assert "Loading weights" not in ran.stderr and "WARNING dspy" not in ran.stderr


def test_the_bars_and_levels_of_other_libraries_are_put_back(tiny_model):
    code = (
        "import logging, sys\nfrom transformers.utils import logging as hub\nfrom fst_optimizer import Policy\n"
        "from fst_optimizer.logs import kept_warnings\n"
        "logging.getLogger('LiteLLM').setLevel(logging.INFO)\n"
        f"Policy({str(tiny_model)!r}).close()\nassert hub.is_progress_bar_enabled()\n"
        "with kept_warnings():\n"
        "    assert logging.getLogger('dspy.clients.lm').level == logging.ERROR\n"
        "    assert logging.getLogger('LiteLLM').level == logging.INFO\n"
        "assert logging.getLogger('dspy.clients.lm').level == logging.NOTSET\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Loading weights" not in ran.stderr


def test_every_command_has_one_example_a_line():
    for command in (["compile"], ["tune"], ["eval"], ["serve"], ["export"], ["lab", "compare"], ["lab", "sweep"]):
        text = fst(*command, "--help").output
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("fst ")]
        assert lines and all(line.count("fst ") == 1 for line in lines), text


def test_the_plain_letters_command_of_the_help_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fst("compile", LETTERS, *SMALL)
    assert said.exit_code == 0, said.output
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("letters-sort-rotate-") and (run / "result.json").exists()
