"""DSPy's own optimizers as methods of a comparison: they stay within the cap, and their runs can be read."""

import json
import subprocess
import sys

import dspy
import pytest

from fst_optimizer.evolve.reflect import ExtractiveReflector
from fst_optimizer.lab import plan
from fst_optimizer.lab.cells import comparison_jobs
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.dspy_methods import ANCHOR, RunCounter, entry_of, proposer, score_in_feedback
from fst_optimizer.lab.methods import DSPY_METHODS, parse_methods
from fst_optimizer.task_run import Sizes

pytestmark = pytest.mark.slow  # the letters model really learns

CAP = 224


@pytest.mark.parametrize("method", DSPY_METHODS)
def test_each_learns_within_the_cap_and_leaves_what_a_comparison_reads(method, tmp_path):
    sets = ("train.lr=1e-3", "rollout.batch_size=4", "rollout.group_size=4", "train.warmup_steps=0")
    cap = CAP if method != "dspy-together" else 2 * CAP + 8 * ANCHOR
    common = plan.Common(cap, sets, None, Sizes(32, 8, 8))
    (job,) = comparison_jobs("programs/letters:sort-rotate", tmp_path, (method,), (3,), common, {})
    ran = subprocess.run([sys.executable, "-m", *job.command()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    run = read_run(job.folder)
    result = run.result
    assert (run.method, result["seed"], run.recorded["config"]["train"]["lr"]) == (method, 3, 1e-3)
    spent = result["rollouts"]["fast"] + result["rollouts"]["slow"]
    assert 0.3 * cap < spent <= cap
    assert len(run.curve) == 2
    assert result["val_score_before"] == run.curve[0].score and result["val_score_after"] == run.curve[1].score
    assert (result["policy_version"] > 0) == (method != "dspy-gepa")
    if method != "dspy-grpo":
        assert "Sort the letters" in json.dumps(result["candidate"])


def test_the_counter_counts_runs_of_the_program_and_nothing_inside_it(scripted):
    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            return self.answer(question=question)

    policy = scripted(lambda prompt, request: "[[ ## answer ## ]]\na\n\n[[ ## completed ## ]]")
    program = Program()
    program.set_lm(policy.lm)
    counter = RunCounter(Program)
    with dspy.context(callbacks=[counter]):
        program(question="a")
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program.deepcopy(), {"question": "b"})] * 3)
    assert counter.count == 4


def test_gepas_entries_keep_score_and_words_apart():
    metric = score_in_feedback(lambda *_: dspy.Prediction(score=0.25, feedback="Sort the letters."))
    feedback = metric(None, None, None, "first", None).feedback
    given = {"Inputs": {}, "Generated Outputs": {}, "Feedback": feedback}
    entry = entry_of(given)
    assert (entry["Score"], entry["Metric Feedback"]) == (0.25, "Sort the letters.")
    unparsed = entry_of({"Inputs": {}, "Generated Outputs": "?", "Feedback": "Your output failed to parse."})
    assert (unparsed["Score"], unparsed["Metric Feedback"]) == (0.0, "")
    proposed = proposer(ExtractiveReflector())({"first": "Answer."}, {"first": [given, given]}, ["first"])
    assert proposed == {"first": "Answer. Sort the letters."}


def test_they_run_on_the_in_process_engine_alone():
    from fst_optimizer import UserError

    with pytest.raises(UserError, match="dspy-grpo@vllm"):
        parse_methods("dspy-grpo@vllm")
