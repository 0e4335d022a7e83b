"""The toy program of the tests: two predictors, its data, metric and answers; a run of it takes a moment.

The policy is a `ScriptedEngine` on a tiny model, so that everything but the sampled words is the real thing.
"""

import threading

import dspy
from dspy.lm15 import Message, RateLimitError, Response, TextPart, Usage

from fst_optimizer import FST, FSTConfig
from fst_optimizer.store.files import read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.testing import chat_answer

RULE = "Mind the gap."
SETTINGS = {
    "fast": {"population": 2, "anchor_size": 3, "max_rollouts": 24, "max_proposals": 2, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": 4},
    "train": {"steps_per_cycle": 2, "lr": 0.01, "warmup_steps": 0},
    "eval": {"kl_examples": 2},
    "budget": {"max_cycles": 2},
    "run": {"dry_run": False},  # tests count what the cycles spend
}
SHORT = {
    "fast": {"population": 2, "anchor_size": 2, "max_rollouts": 12, "max_proposals": 1, "minibatch": 2},
    "rollout": {"group_size": 4, "batch_size": 2, "num_threads": 4},
    "train": {"steps_per_cycle": 1, "lr": 0.01, "warmup_steps": 0},
    "eval": {"kl_examples": 2},
    "budget": {"max_cycles": 1},
    "run": {"dry_run": False},
}
"""One cycle of one step."""


class Program(dspy.Module):
    """Two calls a rollout."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> middle", "Answer."))
        self.second = dspy.Predict(dspy.Signature("middle -> answer", "Answer."))

    def forward(self, question):
        middle = self.first(question=question).middle
        return dspy.Prediction(middle=middle, answer=self.second(middle=middle).answer)


def answer(prompt, request):
    """Right half of the time, and more often where the instruction has the rule."""
    return said(request.seed % 4 < (3 if RULE in prompt else 2))


def coin(prompt, request):
    """Right half of the time, whatever the instruction."""
    return said(request.seed % 2)


def said(right):
    """A completion for either predictor."""
    word = "right" if right else "wrong"
    return chat_answer(middle=word, answer=word)


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    parts = {"first": prediction.middle == "right", "second": prediction.answer == "right"}
    score = sum(parts.values()) / 2 if pred_name is None else float(parts[pred_name])
    return dspy.Prediction(score=score, feedback="Right." if score == 1 else RULE)


def examples(count, start=0):
    return [dspy.Example(question=f"q{start + i}", answer="right").with_inputs("question") for i in range(count)]


TRAIN, VAL = examples(6), examples(4, start=100)


def student_of(policy, **lms):
    """The program on this policy, except for predictors whose LM is given."""
    program = Program()
    program.set_lm(policy.lm)
    for name, lm in lms.items():
        getattr(program, name).lm = lm
    return program


def optimizer(run_dir, *, metric=metric, settings=SETTINGS, values=None, **options):
    config = FSTConfig.from_dict(settings).with_values(values or {})
    return FST(metric, config=config, run_dir=run_dir, **options)


def run_toy(run_dir, policy, **options):
    """The result of a run with the toy program."""
    program = optimizer(run_dir, **options).compile(student_of(policy), trainset=TRAIN, valset=VAL)
    return program.detailed_results.result


def untimed_metrics(run_dir):
    """The lines of metrics.jsonl, with their seconds set to 0."""
    return [line | {"time_s": 0, "step_s": 0} for line in read_metrics(run_dir / "metrics.jsonl")]


def undated_result(run_dir):
    """`result.json` without its seconds, and without the checksum of `config.json`, which holds the run's id."""
    result = read_json(run_dir / "result.json") | {"wall_s": 0}
    del result["files"]["config.json"]
    return result


def assert_same_run(one, other):
    """Two runs came to the same: metrics without their times, state, result and populations.

    But for warnings: what one process saw, such as a damaged file, is no part of what was learned.
    """
    assert untimed_metrics(one) == untimed_metrics(other)
    states = [read_json(run / "state.json")["state"] | {"warnings": []} for run in (one, other)]
    assert states[0] == states[1]
    results = [undated_result(run) | {"alarms": []} for run in (one, other)]
    assert results[0] == results[1]
    for path in (one / "population").glob("*"):
        assert path.read_bytes() == (other / "population" / path.name).read_bytes()


class Reflection(dspy.LM):
    """A reflection LM that always finds the rule, and counts its calls."""

    def __init__(self):
        super().__init__("openai/reflection", api_key="none")
        self.calls = 0

    def __call__(self, prompt=None, messages=None, **kwargs):
        self.calls += 1
        return [f"```\nAnswer. {RULE} ({self.calls})\n```"]


class CountingEngine:
    """The engine of an LM that is not trained: answers, and counts 100 prompt and 10 completion tokens a call."""

    def __init__(self, answer=lambda request: chat_answer(middle="m", score="0.5", answer="right"), fails_at=()):
        self.answer, self.fails_at = answer, fails_at
        self.calls = 0
        self._lock = threading.Lock()

    def complete(self, request):
        with self._lock:
            self.calls += 1
            number = self.calls
        if self.fails_at == "always" or number in self.fails_at:
            raise RateLimitError("slow down")
        return Response(
            id=None,
            model="frozen",
            message=Message.assistant([TextPart(self.answer(request))]),
            finish_reason="stop",
            usage=Usage(input_tokens=100, output_tokens=10, total_tokens=110),
        )

    def __deepcopy__(self, memo):
        return self


def frozen(model="openai/gpt-4o-mini", **settings):
    """An LM that is not trained, and its engine."""
    engine = CountingEngine(**settings)
    return dspy.LM(model, engine=engine, cache=False, num_retries=0), engine
