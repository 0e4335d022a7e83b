"""Twelve programs broken in twelve ways: each stops before its first batch is over, in words that name the cause.

What is said stands in docs/troubleshooting.md, word for word: a user finds it there by searching.
"""

import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import dspy
import pytest

from fst_optimizer import FST, FSTConfig, FSTError, MetricError, Policy, ProgramError, UserError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SMALL = {
    "fast": {"population": 2, "anchor_size": 2, "max_rollouts": 12, "max_proposals": 1, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2},
    "train": {"steps_per_cycle": 1},
    "budget": {"max_cycles": 1},
}
FIRST_BATCH = 8
"""The most rollouts that a broken program may cost."""


@pytest.fixture(scope="module")
def policy():
    policy = Policy(ROOT / "programs" / "letters" / "model", max_tokens=32)
    yield policy
    policy.close()


def examples(letters):
    return [dspy.Example(letters=f"a b {one}", answer=f"{one} b a").with_inputs("letters") for one in letters]


def exact(example, prediction):
    return float(prediction.answer == example.answer)


class Program(dspy.Module):
    """The program before it is broken."""

    ran = 0

    def __init__(self):
        super().__init__()
        self.reverse = dspy.Predict(dspy.Signature("letters -> answer", "Reverse the letters."))

    def forward(self, letters):
        Program.ran += 1
        return self.reverse(letters=letters)


class Typo(Program):
    def forward(self, letters):
        Program.ran += 1
        return self.revers(letters=letters)


class OtherArgument(Program):
    def forward(self, text):
        return self.reverse(letters=text)


class MissingField(Program):
    def forward(self, letters):
        Program.ran += 1
        return dspy.Prediction(answer=self.reverse(letters=letters).reversed)


class NeverAsks(Program):
    def forward(self, letters):
        Program.ran += 1
        return dspy.Prediction(answer=" ".join(reversed(letters.split())))


class OwnThread(Program):
    """Its calls are made by a thread that was started before any rollout."""

    def __init__(self):
        super().__init__()
        self.worker = Worker()

    def forward(self, letters):
        Program.ran += 1
        return self.worker.ask(lambda: self.reverse(letters=letters))


class Worker:
    def __init__(self):
        self.asked = queue.SimpleQueue()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            task, future = self.asked.get()
            try:
                future.set_result(task())
            except Exception as error:
                future.set_exception(error)

    def ask(self, task):
        future = Future()
        self.asked.put((task, future))
        return future.result()

    def __deepcopy__(self, memo):
        return self


class NeverEnds(Program):
    def forward(self, letters):
        Program.ran += 1
        while True:
            time.sleep(0.05)


class Narrowed(Program):
    """Asks for a sampling that training cannot reproduce."""

    def forward(self, letters):
        Program.ran += 1
        return self.reverse(letters=letters, config={"top_p": 0.5})


class TooMuch(Program):
    def forward(self, letters):
        Program.ran += 1
        return self.reverse(letters=" ".join([letters] * 2000))


def hundred(example, prediction):
    return 100.0 * (prediction.answer == example.answer) + 14.5


def misnamed(example, prediction):
    return float(prediction.answer == example.reversed)


def forgot_return(example, prediction):
    prediction.answer == example.answer  # noqa: B015


class Refuses(dspy.LM):
    """A reflection LM with a wrong key."""

    def __init__(self):
        super().__init__("openai/gpt-5-mini", api_key="wrong", api_base="http://127.0.0.1:9/v1", num_retries=0)


BROKEN = {
    "a typo in forward": ({"program": Typo}, ProgramError, "has no attribute 'revers'"),
    "forward takes another argument": (
        {"program": OtherArgument},
        ProgramError,
        "unexpected keyword argument 'letters'",
    ),
    "forward reads a field that no predictor gives": ({"program": MissingField}, ProgramError, "reversed"),
    "the program never asks its LM": ({"program": NeverAsks}, UserError, "no call of the policy was recorded"),
    "calls from a thread of the program's own": ({"program": OwnThread}, UserError, "thread"),
    "the program never ends": ({"program": NeverEnds, "timeout_s": 3}, UserError, "rollout.timeout_s"),
    "a sampling setting that training cannot follow": ({"program": Narrowed}, UserError, "top_p"),
    "a prompt longer than the model's context": ({"program": TooMuch}, UserError, "context"),
    "a metric on 0..100": ({"metric": hundred}, UserError, "[0, 1]"),
    "a metric that raises": ({"metric": misnamed}, MetricError, "reversed"),
    "a metric that returns nothing": ({"metric": forgot_return}, UserError, "returned None"),
    "a reflection LM that refuses": ({"reflection_lm": Refuses}, FSTError, "reflection LM"),
}


def compile_broken(policy, folder, program=Program, metric=exact, reflection_lm=None, timeout_s=60):
    student = program()
    student.set_lm(policy.lm)
    reflector = reflection_lm and reflection_lm()
    config = FSTConfig.from_dict(SMALL).with_values({"rollout.timeout_s": timeout_s})
    fst = FST(metric, config=config, run_dir=folder, reflection_lm=reflector, progress=False)
    return fst.compile(student, trainset=examples("cdefgh"), valset=examples("ijkl"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_program_stops_at_once(name, policy, tmp_path):
    broken, error, cause = BROKEN[name]
    Program.ran = 0
    with pytest.raises(error) as caught:
        compile_broken(policy, tmp_path / "run", **broken)
    said = str(caught.value)
    assert cause in said
    assert Program.ran <= FIRST_BATCH
    assert not (tmp_path / "run" / "result.json").exists()
    assert searchable(said) in searchable(section(name)), said


def test_the_program_before_it_is_broken_runs(policy, tmp_path):
    assert compile_broken(policy, tmp_path / "run").detailed_results.result["ended"]


def section(name):
    """What the page says under the heading of one mistake."""
    found = re.search(rf"^### {re.escape(name.capitalize())}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S | re.I)
    assert found, f"{PAGE.name} has no heading {name.capitalize()!r}"
    return found[1]


def searchable(text):
    """A text without what differs from try to try: paths, line numbers, which example was first, spaces."""
    text = re.sub(r'File "[^"]*"|[^ (]*\.py:\d+', "", text)
    return " ".join(re.sub(r"line \d+|train-\d", "", text).split())


def test_the_list_of_errors_is_as_the_code_is():
    done = subprocess.run([sys.executable, ROOT / "docs" / "errors_page.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_that_the_page_names_exist():
    (table,) = re.findall(r"^## What used to pass in silence\n(.*?)^## ", PAGE.read_text(), re.M | re.S)
    named = {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])}
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 15
    assert {name for name in named if not ((ROOT / name).is_file() or f"def {name}(" in code)} == set()
