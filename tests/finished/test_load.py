"""Which programs a finished run is loaded into, and which are refused before any model is."""

from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest

from fst_optimizer import FST, UserError, load
from fst_optimizer.finished import load as loading
from fst_optimizer.finished.export import export_run
from fst_optimizer.store.files import read_json
from fst_optimizer.tasks import load_task
from helpers import toy
from helpers.fst import fst
from helpers.toy import SHORT, answer, optimizer

TASK = '''
import sys
from types import SimpleNamespace

sys.path.insert(0, {helpers!r})

import dspy

from helpers import toy


class Mine(dspy.BaseLM):
    """An LM of one's own, of which dspy writes a state that it refuses to read."""

    def forward(self, prompt=None, messages=None, **kwargs):
        text = "[[ ## middle ## ]]\\nright\\n\\n[[ ## answer ## ]]\\nright\\n\\n[[ ## completed ## ]]"
        message = SimpleNamespace(content=text, tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop", logprobs=None)
        return SimpleNamespace(choices=[choice], usage={{}}, model="mine", _hidden_params={{}})


class Other(toy.Program):
    def __init__(self):
        super().__init__()
        self.third = self.second
        del self.second


class Wider(toy.Program):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question, hint -> middle")


def build_program(variant=None):
    program = dict(bare=toy.Program, other=Other, wider=Wider).get(variant, toy.Program)()
    if variant is None:
        program.second.lm = Mine("mine/model")
    return program


def load(split, size=None, seed=0, variant=None):
    return toy.examples(4, dict(train=0, val=100, test=200)[split])


metric = toy.metric
'''

pytestmark = pytest.mark.filterwarnings("ignore:Implementing custom LMs", "ignore:Implementing custom")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "own"
    folder.mkdir()
    (folder / "task.py").write_text(TASK.format(helpers=str(Path(__file__).parents[1])))
    return folder


@pytest.fixture
def run(task, tmp_path, scripted):
    """A finished run of a program whose second predictor is on a custom LM."""
    loaded, policy = load_task(str(task)), scripted(answer)
    program = loaded.build_program()
    program.first.lm = policy.lm
    fst = optimizer(tmp_path / "run", settings=SHORT, task=str(task), testset=loaded.load("test"))
    fst.compile(program, trainset=loaded.load("train"), valset=loaded.load("val"))
    return tmp_path / "run"


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", refuse)


def test_a_custom_lm_comes_from_the_program_that_the_caller_or_the_task_builds(run, task, tiny_model):
    mine = load_task(str(task)).build_program()
    lm = mine.second.lm
    for program in (load(run, program=mine, model=tiny_model), load(run, task=str(task), model=str(tiny_model))):
        try:
            assert type(program.second.lm).__name__ == "Mine" and program.second.lm.model == "mine/model"
            assert program.second(middle="x").answer == "right"
            assert program.first.lm.engine.policy.source
        finally:
            program.first.lm.engine.policy.close()
    assert mine.second.lm is lm


def test_eval_scores_a_run_with_a_custom_lm(run, task, tiny_model):
    said = fst("eval", task, "--run-dir", run, "--model", tiny_model)
    assert said.exit_code == 0, said.output
    assert "test" in said.stdout and "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("other", "Other is not that of the run in '{run}': of its predictors it lacks second and adds third"),
        ("wider", "predictor 'first' has the fields Question:, Hint:, Middle: and had Question:, Middle: in the run"),
        ("bare", "predictor 'second' had an LM of its own in the run in '{run}'"),
    ],
)
def test_another_program_is_refused_by_what_differs_before_a_model_is_loaded(run, task, no_model, variant, message):
    said = fst("eval", f"{task}:{variant}", "--run-dir", run)
    assert said.exit_code == 2
    assert message.format(run=run) in said.stderr
    with pytest.raises(UserError) as raised:
        load(run, program=load_task(f"{task}:{variant}").build_program())
    assert message.format(run=run) in str(raised.value)


def test_fields_that_are_only_called_otherwise_are_warned_of(caplog):
    predict = dspy.Predict("question -> answer")
    saved = {"predict": {"signature": dspy.Signature("question -> reply").dump_state(), "lm": {}}}
    program = SimpleNamespace(named_predictors=lambda: [("predict", predict)])
    assert loading.checked_state(saved, program, "run")["predict"]["lm"] is None
    assert "'Answer:'] and had ['Question:', 'Reply:'] in the run: its scores may be others" in caplog.text


def test_a_program_that_is_one_predictor_is_loaded_and_exported(tmp_path, scripted, tiny_model):
    def metric(example, prediction):
        return float(prediction.answer == "right")

    student = dspy.Predict(dspy.Signature("question -> answer", "Answer."))
    student.set_lm(scripted(answer).lm)
    fst_ = FST(metric, config=SHORT, run_dir=tmp_path / "run", progress=False)
    fst_.compile(student, trainset=toy.TRAIN, valset=toy.VAL)
    loaded = load(tmp_path / "run", program=dspy.Predict("question -> answer"), model=tiny_model)
    loaded.lm.engine.policy.close()
    learned = read_json(tmp_path / "run" / "result.json")["candidate"]["self"]
    assert loaded.signature.instructions == learned
    export_run(tmp_path / "run", tmp_path / "out", merge=True, model=tiny_model)
    plain = dspy.Predict("question -> answer")
    plain.load(tmp_path / "out" / "program.json")
    assert plain.signature.instructions == learned and plain.lm.model == "hosted_vllm/fst-policy"
    with pytest.raises(UserError, match="of its predictors it lacks self and adds first, second"):
        load(tmp_path / "run", program=toy.Program(), model=tiny_model)
