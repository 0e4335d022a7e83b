"""Two LMs in one program: an API model answers, and a small local model, which is trained, tidies its answer up."""

import dspy
from own_program import examples, grade

from fst_optimizer import FST, Policy


class AnswerAndTidy(dspy.Module):
    def __init__(self, frozen):
        super().__init__()
        self.answer = dspy.Predict(dspy.Signature("letters -> draft", "Drop the last letter."))
        self.answer.lm = frozen  # an LM of its own: run, counted and paid for, never trained
        self.tidy = dspy.Predict("draft -> answer")

    def forward(self, letters):
        draft = self.answer(letters=letters).draft
        return dspy.Prediction(draft=draft, answer=self.tidy(draft=draft).answer)


def metric(example, prediction, trace=None):
    score = grade(prediction.answer, example.order)
    return dspy.Prediction(score=score, feedback="" if score == 1 else "Drop the first letter, then sort the letters.")


def main(config=None, frozen=None):
    frozen = frozen or dspy.LM("openai/gpt-5-mini", temperature=1.0, max_tokens=16000)  # reads OPENAI_API_KEY
    policy = Policy("letters", max_tokens=64)
    program = AnswerAndTidy(frozen)
    program.tidy.lm = policy.lm
    # The frozen model's instruction is left alone; without this line it would evolve too.
    config = {"predictors": {"answer": "neither"}, **(config or {})}
    better = FST(metric, config=config).compile(program, trainset=examples(256, 0), valset=examples(64, 1))
    result = better.detailed_results.result
    print(result["lm_usage"], result["cost_usd"])
    return better


if __name__ == "__main__":
    main()
