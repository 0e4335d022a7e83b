"""DSPy's own optimizers on a local policy: finetuning on its own right answers, then GRPO, no other server needed."""

import dspy
from dspy.teleprompt.grpo import GRPO
from own_program import TrimAndOrder, examples, metric

from fst_optimizer import Policy


def score(example, prediction, trace=None):
    return float(metric(example, prediction).score)  # a number: these optimizers read no feedback


def good(example, prediction, trace=None):
    return score(example, prediction) > 0.5


def main(steps=30, size=256):
    policy = Policy("letters", max_tokens=64)
    program = TrimAndOrder()
    program.set_lm(policy.lm)
    train, val = examples(size, 0), examples(64, 1)
    # GRPO's default prompt format is another than the program's own: completions would match no prompt that was asked.
    grpo = GRPO(
        score,
        adapter=dspy.ChatAdapter(),
        exclude_demos=True,
        num_train_steps=steps,
        num_dspy_examples_per_grpo_step=8,
        num_rollouts_per_grpo_step=8,
        num_threads=32,
        train_kwargs={"lr": 1e-3},
    )
    finetune = dspy.BootstrapFinetune(good, num_threads=32, train_kwargs={"lr": 1e-3})
    together = dspy.BetterTogether(score, f=finetune, g=grpo)
    better = together.compile(program, trainset=train, valset=val, strategy="f -> g", num_threads=32)
    for tried in better.candidate_programs:
        print(tried["strategy"] or "as it was", tried["score"])
    print(policy)
    return better


if __name__ == "__main__":
    main()
