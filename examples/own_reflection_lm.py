"""Instructions written by an LM of your choice, by GEPA's reflective proposer, in place of the built-in reflector."""

import dspy
from own_program import TrimAndOrder, examples, metric

from fst_optimizer import FST, Policy


def main(config=None, reflection_lm=None):
    # Called a few times a cycle and never trained. `policy.base_lm` would be the policy's own frozen base.
    reflection_lm = reflection_lm or dspy.LM("openai/gpt-5.2", temperature=1.0, max_tokens=16000)
    policy = Policy("letters", max_tokens=64)
    program = TrimAndOrder()
    program.set_lm(policy.lm)
    fst = FST(metric, reflection_lm=reflection_lm, config=config)
    better = fst.compile(program, trainset=examples(256, 0), valset=examples(64, 1))
    result = better.detailed_results.result
    print(result["reflection_calls"], result["cost_usd"], result["candidate"])
    return better


if __name__ == "__main__":
    main()
