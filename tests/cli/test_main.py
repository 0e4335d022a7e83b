import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.figures import is_png
from helpers.fst import LETTERS, SMALL, fst
from helpers.run_check import assert_as_designed

STOPPING_TASK = """
import _thread
from pathlib import Path

from fst_optimizer.tasks import load_task

letters = load_task("programs/letters:sort-rotate")
STOP = Path(__file__).with_name("stop")
model, calls, pressed = letters.model, [], []


def build_program(variant=None):
    return letters.build_program()


def load(split, size=None, seed=0, variant=None):
    return letters.load(split, size, seed)


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    calls.append(1)
    if STOP.exists() and len(calls) > int(STOP.read_text()) and not pressed:
        pressed.append(1)
        _thread.interrupt_main()  # what Ctrl-C does
    return letters.metric(example, prediction, trace, pred_name, pred_trace)
"""


def result_of(run):
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A finished run, and what the command said."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return run, fst("compile", LETTERS, "--run-dir", run, "--seed", 3, *SMALL)


def test_compile_leaves_a_run_as_designed_and_says_what_came_of_it(compiled):
    run, said = compiled
    assert said.exit_code == 0, said.output
    assert_as_designed(run)
    result = result_of(run)
    assert (result["task"], result["method"], result["seed"], result["cycles"]) == (LETTERS, "fst", 3, 1)
    assert "before the first cycle: val score" in said.stderr and "cycle 1 of 1, step 1 of 1: reward" in said.stderr
    assert f"{result['test_score_after']:.4f}" in said.stdout
    assert f"fst eval {LETTERS} --run-dir" in said.stdout


def test_the_test_rollouts_are_counted_as_evaluation(compiled):
    run, _ = compiled
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The last line comes before the best pair is scored on 8 test examples; the first counts validation alone.
    assert result_of(run)["rollouts"]["eval"] == lines[-1]["rollouts"]["eval"] + 8
    assert lines[0]["rollouts"]["eval"] == 2 + 8  # the dry run and the validation set


@pytest.mark.slow
def test_eval_in_a_new_process_gives_exactly_the_recorded_score(compiled):
    run, _ = compiled
    command = [sys.executable, "-m", "fst_optimizer.cli.main", "eval", LETTERS, "--run-dir", str(run)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "the recorded score, exactly" in ran.stdout
    assert ran.stdout.count(f"{result_of(run)['test_score_after']:.4f}") == 2
    assert "Loading weights" not in ran.stderr and "Traceback" not in ran.stderr


def test_eval_on_other_examples_does_not_compare(compiled):
    said = fst("eval", LETTERS, "--run-dir", compiled[0], "--test-size", 4)
    assert said.exit_code == 0, said.output
    assert "other examples than the recorded score" in said.stdout


def test_a_crash_between_the_last_cycle_and_the_result_is_mended_by_resume(compiled, tmp_path):
    run = shutil.copytree(compiled[0], tmp_path / "run")
    before = result_of(run)
    (run / "result.json").unlink()
    said = fst("compile", LETTERS, "--run-dir", run, "--resume")
    assert said.exit_code == 0, said.output
    after = result_of(run)
    assert {**after, "wall_s": 0} == {**before, "wall_s": 0}
    assert_as_designed(run)


def test_a_finished_run_is_refused(compiled):
    said = fst("compile", LETTERS, "--run-dir", compiled[0], *SMALL)
    assert said.exit_code == 2
    assert "holds a finished run: give another directory" in said.stderr


@pytest.mark.slow
def test_sigterm_ends_a_run_as_ctrl_c_does_and_it_goes_on_from_there(tmp_path):
    run = tmp_path / "run"
    command = ["compile", LETTERS, "--run-dir", str(run), *SMALL, "--set", "budget.max_cycles=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fst_optimizer.cli.main", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while '"kind": "step"' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert process.poll() is None, process.stderr.read()
    said = fst(*command, "--resume")
    assert said.exit_code == 2 and "is being written by another process" in said.stderr
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"interrupted; go on with: fst compile {LETTERS} --run-dir {run} --resume" in stderr.replace("\n", "")
    assert "Traceback" not in stderr
    done = result_cycles(run)
    said = fst("compile", LETTERS, "--run-dir", run, "--resume", "--set", f"budget.max_cycles={done + 1}")
    assert said.exit_code == 2 and "budget.max_cycles: 100000" in said.stderr


def test_a_monitor_that_pauses_ends_the_command_with_3_and_a_resume_goes_on(tmp_path):
    run = tmp_path / "run"
    loud = ("--set", "monitors.flat=pause", "--set", "monitors.flat_batches=1", "--set", "rollout.temperature=1e-6")
    paused = fst("compile", LETTERS, "--run-dir", run, *SMALL, *loud)
    assert paused.exit_code == 3, paused.output
    said = " ".join(paused.stderr.split())
    assert "paused: monitor flat: in 1 batches in a row every group had one reward only" in said
    assert "Resume to go on all the same (--resume" in said
    again = fst("compile", LETTERS, "--run-dir", run, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads((run / "result.json").read_text())["alarms"][0].startswith("flat: ")


def result_cycles(run):
    return json.loads((run / "state.json").read_text())["state"]["cycle"]


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path):
    task, run = tmp_path / "task", tmp_path / "run"
    task.mkdir()
    (task / "task.py").write_text(STOPPING_TASK)
    # 8 validation and 8 test examples come first, then the cycle.
    (task / "stop").write_text("20")
    stopped = fst("compile", task, "--run-dir", run, *SMALL)
    assert stopped.exit_code == 130, stopped.output
    assert f"go on with: fst compile {task} --run-dir {run} --resume" in stopped.stderr
    assert not (run / "result.json").exists()

    assert "unfinished run: finish it first" in fst("eval", task, "--run-dir", run).stderr
    again = fst("compile", task, "--run-dir", run, *SMALL)
    assert again.exit_code == 2 and "holds an unfinished run: resume it" in again.stderr
    other = fst("compile", task, "--run-dir", run, "--resume", "--seed", "9")
    assert other.exit_code == 2 and "config.seed: 0 -> 9" in other.stderr
    other = fst("compile", task, "--run-dir", run, "--resume", "--set", "lora.rank=4")
    assert other.exit_code == 2 and "leave the lora settings out" in other.stderr

    (task / "stop").unlink()
    # Sizes and settings need not be said again.
    resumed = fst("compile", task, "--run-dir", run, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_as_designed(run)
    assert json.loads((run / "config.json").read_text())["data"]["test"]["examples"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["programs/letters/task.py"], "is a file: give its folder, 'programs/letters'"),
        (["programs/nowhere"], "no folder with a task.py and no module by that name; try programs/letters"),
        (["programs/letters:nope"], "unknown variant 'nope'"),
        ([LETTERS, "--set", "train.lrr=1"], "unknown setting 'train.lrr'; did you mean 'train.lr'?"),
        ([LETTERS, "--set", "train.lr"], "give NAME=VALUE"),
        ([LETTERS, "--set", "train.lr=-1"], "train.lr is -1"),
        ([LETTERS, "--set", "rollout.group_size=6"], "must be divisible by fast.population (4)"),
        ([LETTERS, "--method", "flst"], "method is 'flst': did you mean 'fst'?"),
        ([LETTERS, "--method", "sequential"], "budget.max_rollouts is None"),
        ([LETTERS, "--seed", "-1"], "seed is -1"),
        ([LETTERS, "--max-cycles", "0"], "budget.max_cycles is 0"),
        ([LETTERS, "--engine", "torhc"], "engine is 'torhc'"),
        ([LETTERS, "--model", "/no/such/model"], "no such folder"),
        ([LETTERS, "--config", "/no/such/file.json"], "no such file"),
        ([LETTERS, "--val-size", "0"], "--val-size"),
        ([LETTERS, "--auto", "lite"], "auto is 'lite': did you mean 'light'?"),
    ],
)
def test_bad_input_exits_2_with_one_line_that_helps(arguments, message, tmp_path):
    run = tmp_path / "run"
    said = fst("compile", *arguments, "--run-dir", run)
    assert said.exit_code == 2, said.output
    assert message in said.stderr
    assert "Traceback" not in said.stderr
    assert not (run / "metrics.jsonl").exists()


def test_a_run_from_given_instructions_is_resumed_evaluated_and_loaded_with_them(tmp_path, monkeypatch):
    given, run = tmp_path / "given.json", tmp_path / "run"
    text = "Sort the letters, then move the first letter to the end."
    given.write_text(json.dumps({"first": text}))
    once = ("--method", "once", "--set", "fast.once_rollouts=0", *SMALL)
    from fst_optimizer import cycle

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cycle, "slow_step", killed)
        assert fst("compile", LETTERS, "--run-dir", run, "--instructions", given, *once).exit_code == 130
    program = json.loads((run / "config.json").read_text())["program"]
    assert (program["instructions"], program["instructions_given"]) == ({"first": text}, True)
    given.write_text(json.dumps({"first": "Reverse the letters."}))
    other = fst("compile", LETTERS, "--run-dir", run, "--resume", "--instructions", given)
    assert other.exit_code == 2 and "program.instructions.first" in other.stderr
    resumed = fst("compile", LETTERS, "--run-dir", run, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert_as_designed(run)
    result = json.loads((run / "result.json").read_text())
    assert (result["method"], result["candidate"], result["rollouts"]["fast"]) == ("once", {"first": text}, 0)
    evaluated = fst("eval", LETTERS, "--run-dir", run)
    assert "the recorded score, exactly" in evaluated.output, evaluated.output
    from fst_optimizer import load

    loaded = load(run, task=LETTERS)
    assert {one.signature.instructions for one in loaded.predictors()} == {text}
    loaded.predictors()[0].lm.engine.policy.close()


def test_a_broken_config_file_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{")
    said = fst("compile", LETTERS, "--run-dir", tmp_path / "run", "--config", path)
    assert said.exit_code == 2 and "mine.json: not readable as JSON" in said.stderr


def test_eval_of_no_run_says_so(tmp_path):
    said = fst("eval", LETTERS, "--run-dir", tmp_path)
    assert said.exit_code == 2 and "is this a run directory?" in said.stderr


def test_help_teaches_and_needs_no_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fst_optimizer.cli.main import app\n"
        "said = CliRunner().invoke(app, ['compile', '--help'])\n"
        "assert said.exit_code == 0\nprint(said.output)\n"
        "assert not {'torch', 'dspy', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for words in (
        "fst compile programs/letters --run-dir runs/first --resume",
        "Writes the run's folder",
        "PATH_OR_MODULE[:VARIANT]",
        "gepa: prompts alone",
    ):
        assert words in " ".join(ran.stdout.replace("│", " ").split())


@pytest.mark.slow
def test_a_comparison_runs_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    command = ["lab", "compare", LETTERS, "--methods", "fst,rl", "--seeds", "5", "--out", out, "--max-rollouts", "32"]
    sizes = SMALL[2:]
    said = fst(*command, *sizes, "--jobs", "2")
    assert said.exit_code == 0, said.output
    data = json.loads((out / "sort-rotate" / "compare.json").read_text())
    assert [(run["method"], run["seed"]) for run in data["runs"]] == [("fst", 5), ("rl", 5)]
    for run in data["runs"]:
        assert 0 < run["rollouts"]["fast"] + run["rollouts"]["slow"] <= 32
        assert_as_designed(out / "sort-rotate" / run["dir"])
    assert is_png(out / "sort-rotate" / "score_by_rollouts.png")
    assert "Reaching RL's best" in said.stdout

    again = fst(*command, *sizes, "--jobs", "2")
    assert "2 of 2 runs were finished before" in again.stderr and "started" not in again.stderr
    other = fst(*command, *sizes, "--set", "train.lr=0.5")
    assert other.exit_code == 2 and ", not 0.5): give another --out" in other.stderr
    page = tmp_path / "results.md"
    said = fst("lab", "report", out, "--out", page, "--keep", tmp_path / "kept")
    assert said.exit_code == 0 and "kept/out.json" in said.stdout
    assert "figures/letters-sort-rotate.png" in page.read_text()


def test_a_run_that_fails_in_a_comparison_shows_the_end_of_its_log(tmp_path):
    task = tmp_path / "task"
    task.mkdir()
    broken = "raise RuntimeError('no scorer here')\n"
    (task / "task.py").write_text(STOPPING_TASK.split("    calls.append")[0] + "    " + broken)
    command = ["lab", "compare", task, "--methods", "rl", "--seeds", "0", "--out", tmp_path / "out", *SMALL[2:]]
    said = fst(*command)
    assert said.exit_code == 1
    assert "task/rl-seed0 failed with exit code 1" in said.stderr and "no scorer here" in said.stderr


def test_lab_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fst("lab", "compare", LETTERS, "--out", tmp_path)
    assert said.exit_code == 2
    assert "pip install 'fst-optimizer[lab]'" in said.stderr
    assert Path(tmp_path).exists()
