"""An LM as the metric. Its calls are counted and paid for; none of them is trained on."""

import dspy
from own_program import TrimAndOrder, examples

from fst_optimizer import FST, Policy


class Judge(dspy.Signature):
    """Say how much of the answer is right, from 0 to 1, and in one general sentence what must be done differently."""

    letters: str = dspy.InputField()
    expected: str = dspy.InputField()
    answer: str = dspy.InputField()
    score: float = dspy.OutputField()
    advice: str = dspy.OutputField()


def main(config=None, judge_lm=None):
    judge = dspy.Predict(Judge)
    judge.lm = judge_lm or dspy.LM("openai/gpt-5-mini", temperature=1.0, max_tokens=16000)

    def metric(example, prediction, trace=None):
        said = judge(letters=example.letters, expected=example.order, answer=str(prediction.order))
        return dspy.Prediction(score=min(1.0, max(0.0, said.score)), feedback=said.advice)

    policy = Policy("letters", max_tokens=64)
    program = TrimAndOrder()
    program.set_lm(policy.lm)
    better = FST(metric, config=config).compile(program, trainset=examples(256, 0), valset=examples(64, 1))
    print(better.detailed_results.result["lm_usage"])
    return better


if __name__ == "__main__":
    main()
