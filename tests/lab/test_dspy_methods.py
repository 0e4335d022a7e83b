"""DSPy's own optimizers as methods of a comparison: they stay within the cap, and their runs can be read."""

import json
import subprocess
import sys

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.evolve.extractive import ExtractiveReflector
from fst_optimizer.evolve.reflect import LMReflector
from fst_optimizer.lab import plan
from fst_optimizer.lab.cells import comparison_jobs
from fst_optimizer.lab.compare import read_run
from fst_optimizer.lab.dspy_methods import ANCHOR, RunCounter, entry_of, gepa, proposer, score_in_feedback
from fst_optimizer.lab.methods import DSPY_METHODS, parse_methods
from fst_optimizer.task_run import Sizes
from fst_optimizer.testing import chat_answer
from helpers.toy import RULE, TRAIN, Reflection, metric, student_of

pytestmark = pytest.mark.slow  # the letters model really learns

CAP = 224


@pytest.mark.parametrize("method", DSPY_METHODS)
def test_each_learns_within_the_cap_and_leaves_what_a_comparison_reads(method, tmp_path):
    sets = ("train.lr=3e-3", "rollout.batch_size=4", "rollout.group_size=4", "train.warmup_steps=0")
    cap = CAP if method != "dspy-together" else 2 * CAP + 8 * ANCHOR
    common = plan.Common(cap, sets, None, Sizes(32, 8, 8))
    (job,) = comparison_jobs("programs/letters:sort-rotate", tmp_path, (method,), (3,), common, {})
    ran = subprocess.run([sys.executable, "-m", *job.command()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    run = read_run(job.folder)
    result = run.result
    assert (run.method, result["seed"], run.recorded["config"]["train"]["lr"]) == (method, 3, 3e-3)
    spent = result["rollouts"]["fast"] + result["rollouts"]["slow"]
    assert 0.3 * cap < spent <= cap
    assert len(run.curve) == 2
    assert result["val_score_before"] == run.curve[0].score and result["val_score_after"] == run.curve[1].score
    assert (result["steps"] > 0) == (method != "dspy-gepa")
    if method != "dspy-together":  # there the prompt alone may do as well
        assert (result["policy_version"] > 0) == (method == "dspy-grpo")
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
    assert unparsed["Feedback"] == "Your output failed to parse."
    scored = entry_of({**given, "Feedback": "[0.250000]\n"})
    assert scored["Feedback"] == "This response got a score of 0.25."  # as our own reflector's entries say it
    proposed = proposer(ExtractiveReflector())({"first": "Answer."}, {"first": [given, given]}, ["first"])
    assert proposed == {"first": "Answer. Sort the letters."}


def entries(score):
    return {"first": [{"Inputs": {"question": "q"}, "Generated Outputs": {}, "Feedback": f"[{score:.6f}]\nNo."}]}


def test_a_reflection_lm_is_asked_where_something_fails_and_no_more_than_the_cap():
    lm = Reflection()
    propose = proposer(LMReflector(lm), most=2)
    right = propose({"first": "Answer."}, entries(1.0), ["first"])
    assert (right, lm.calls) == ({"first": "Answer."}, 0)
    first, second, third = (propose({"first": "Answer."}, entries(0.0), ["first"]) for _ in range(3))
    assert first == {"first": f"Answer. {RULE} (1)"} and second == {"first": f"Answer. {RULE} (2)"}
    assert (third, lm.calls) == ({"first": "Answer."}, 2)


def test_gepa_stops_once_its_reflections_are_used_up(scripted):
    policy = scripted(lambda prompt, request: chat_answer(middle="wrong", answer="wrong"))
    values = {"fast.reflection_calls": 3, "fast.minibatch": 2, "rollout.num_threads": 2}
    config, reflector = FSTConfig().with_values(values), LMReflector(Reflection())
    program = student_of(policy)
    counter = RunCounter(type(program))
    with dspy.context(callbacks=[counter], adapter=dspy.ChatAdapter(use_json_adapter_fallback=False), lm=policy.lm):
        gepa(metric, 400, config, reflector).compile(program, trainset=TRAIN, valset=TRAIN)
    assert reflector.calls == 3
    # The seed on six examples, and for each reflection its parent's minibatch and its child's: nothing gets better.
    assert counter.count == 6 + 3 * (2 + 2)


def test_they_run_on_the_in_process_engine_alone():
    from fst_optimizer import UserError

    with pytest.raises(UserError, match="dspy-grpo@vllm"):
        parse_methods("dspy-grpo@vllm")
