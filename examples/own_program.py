"""A compound program of one's own, learned end to end: two predictors on one policy, feedback for each of them."""

import random

import dspy

from fst_optimizer import FST, Policy

RULES = {"trim": "Drop the last letter.", "order": "Drop the first letter, then sort the letters."}


class TrimAndOrder(dspy.Module):
    def __init__(self):
        super().__init__()
        self.trim = dspy.Predict("letters -> middle")
        self.order = dspy.Predict("middle -> answer")

    def forward(self, letters):
        middle = self.trim(letters=letters).middle
        return dspy.Prediction(trim=middle, order=self.order(middle=middle).answer)


def grade(got, right):  # positions right, over the longer list: what is partly right must earn something
    pairs = zip(got.split(), right.split(), strict=False)
    return sum(one == other for one, other in pairs) / max(len(got.split()), len(right.split()))


def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
    asked = [pred_name] if pred_name else list(RULES)  # one predictor's share, or the whole program
    grades = {name: grade(prediction[name], example[name]) for name in asked}
    feedback = " ".join(RULES[name] for name in asked if grades[name] < 1)
    return dspy.Prediction(score=sum(grades.values()) / len(grades), feedback=feedback)


def examples(count, seed):
    draw = random.Random(seed)
    lists = [draw.sample("abcdefghij", draw.randint(5, 8)) for _ in range(count)]
    right = [{"letters": x, "trim": x[:-1], "order": sorted(x[1:-1])} for x in lists]
    return [dspy.Example({k: " ".join(v) for k, v in row.items()}).with_inputs("letters") for row in right]


def main(config=None):
    policy = Policy("letters", max_tokens=64)
    program = TrimAndOrder()
    program.set_lm(policy.lm)
    better = FST(metric, config=config).compile(program, trainset=examples(256, 0), valset=examples(64, 1))
    print(better.detailed_results.result["candidate"])
    print(better(letters="c a d b"))
    return better


if __name__ == "__main__":
    main()
