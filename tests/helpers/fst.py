"""The command line on a letters task that takes seconds."""

from typer.testing import CliRunner

from fst_optimizer.cli.main import app

LETTERS = "programs/letters:sort-rotate"
SMALL = [
    *("--max-cycles", "1", "--train-size", "16", "--val-size", "8", "--test-size", "8"),
    *("--set", "train.steps_per_cycle=1", "--set", "rollout.batch_size=2", "--set", "policy.max_tokens=32"),
    *("--set", "fast.anchor_size=4", "--set", "fast.max_rollouts=16", "--set", "eval.kl_examples=4"),
]


def fst(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
