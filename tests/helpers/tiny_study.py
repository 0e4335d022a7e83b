"""A program, its data and a search space with which a trial takes a moment, for tests of studies."""

import dspy

from fst_optimizer import FSTConfig, tune
from fst_optimizer.testing import chat_answer

RULE = "Say right, never wrong."
SETTINGS = {
    "method": "gepa",
    "fast": {"population": 2, "anchor_size": 2, "max_rollouts": 12, "max_proposals": 1, "minibatch": 1},
    "rollout": {"group_size": 2, "batch_size": 2, "num_threads": 4},
    "train": {"steps_per_cycle": 1, "lr": 0.01, "warmup_steps": 0},
    "eval": {"kl_examples": 1},
    "budget": {"max_rollouts": 36},
    "run": {"dry_run": False},
}
"""Of trials that never train, and so take no time."""
TRAINING = {"method": "fst", "fast.max_rollouts": 4, "rollout.batch_size": 1, "budget.max_rollouts": 12}
SPACE = {
    "train.lr": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True},
    "rollout.group_size": {"type": "choice", "choices": [2, 4]},
    "fast.population": {"type": "divisor", "of": "rollout.group_size", "choices": [1, 2]},
    "lora.rank": {"type": "choice", "choices": [1, 8, 16]},
    "lora.alpha": {"type": "multiple", "of": "lora.rank", "times": [1, 2]},
}


class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

    def forward(self, question):
        return self.answer(question=question)


def answer(prompt, request):
    """Right half of the time, and more often where the instruction has the rule."""
    return chat_answer(answer="right" if request.seed % 4 < (3 if RULE in prompt else 2) else "wrong")


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    score = float(prediction.answer == "right")
    return dspy.Prediction(score=score, feedback="Right." if score else RULE)


def examples(count, start=0):
    return [dspy.Example(question=f"q{start + i}", answer="right").with_inputs("question") for i in range(count)]


TRAIN, VAL, TEST = examples(6), examples(4, 100), examples(4, 200)


def student_of(policy):
    program = Program()
    program.set_lm(policy.lm)
    return program


def tuned(policy, folder, **options):
    """A study of the program on this policy; a trial may take 36 training rollouts."""
    values = {"seed": 0, **options.pop("values", {})}
    given = {"space": SPACE, "config": FSTConfig.from_dict(SETTINGS).with_values(values), "trials": 2, **options}
    return tune(student_of(policy), given.pop("metric", metric), TRAIN, VAL, folder=folder, **given)
