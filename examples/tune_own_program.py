"""The settings for a program of one's own, searched for: the program of own_program.py, and three settings."""

from own_program import TrimAndOrder, examples, metric

from fst_optimizer import FST, Policy, tune

SPACE = {
    "train.lr": {"type": "float", "low": 5e-4, "high": 5e-3, "log": True},
    "train.steps_per_cycle": {"type": "int", "low": 2, "high": 8},
    "lora.rank": {"type": "choice", "choices": [8, 16, 32]},
}


def main(config=None, trials=12):
    policy = Policy("letters", max_tokens=64)
    program = TrimAndOrder()
    program.set_lm(policy.lm)
    train, val = examples(256, 0), examples(64, 1)
    found = tune(program, metric, train, val, trials=trials, space=SPACE, config=config)
    print(f"trial {found.best_trial} is the best, {found.best_score:.3f}; see {found.folder}/report.md")

    policy.start_over(found.best_lora)  # the best trial's adapter shape, untrained
    better = FST(metric, config=found.best_config).compile(program, trainset=train, valset=val)
    print(better(letters="c a d b"))
    return found, better


if __name__ == "__main__":
    main()
