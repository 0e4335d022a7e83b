"""Go on from a finished run: its instructions and its weights are where the next run starts."""

import own_program
from own_program import TrimAndOrder, examples, metric

import fst_optimizer
from fst_optimizer import FST


def main(config=None):
    first = own_program.main(config).detailed_results
    program = fst_optimizer.load(first.run_dir, program=TrimAndOrder())
    # Other examples, as if new ones had come in. The new run's policy versions are numbered on from the old one's.
    run_dir = first.run_dir.with_name(f"{first.run_dir.name}-again")
    fst = FST(metric, config=config, run_dir=run_dir)
    better = fst.compile(program, trainset=examples(256, 2), valset=examples(64, 1))
    print(first.result["val_score_after"], "->", better.detailed_results.result["val_score_after"])
    return better


if __name__ == "__main__":
    main()
