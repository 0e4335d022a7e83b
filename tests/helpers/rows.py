"""Rows of comparisons as they are kept, for tests of the page and its verdicts."""

from fst_optimizer.lab.methods import reads_feedback

VERSIONS = {"python": "3.11"}
CURVES = {
    # Rollouts, score, KL, whether it is the end of a cycle. RL's best of .6 is settled at .58: see the tests of curves.
    "rl": [[0, 0.2, 0.0, 1], [100, 0.5, 0.1, 1], [200, 0.58, 0.4, 1], [300, 0.6, 0.8, 1]],
    "fst": [[0, 0.2, 0.0, 1], [30, 0.59, 0.0, 0], [60, 0.6, 0.05, 1], [300, 0.8, 0.1, 1]],
    "gepa": [[0, 0.2, 0.0, 1], [30, 0.4, 0.0, 1], [300, 0.4, 0.0, 1]],
    "sft": [[0, 0.2, 0.0, 1], [0, 0.9, 0.4, 1]],
}
"""What `fst` and others are like on every rule; methods that are not here are like `fst`."""


def row(method="fst", test=0.8, *, rule="a", kind="told", family="letters", seed=0, cap=300, **fields):
    """A row as `run_row` makes it."""
    curve = CURVES.get(method.split("+")[0], CURVES["fst"])
    searches = method.split("+")[0] in ("fst", "gepa", "once", "sequential")
    return {
        "task": f"programs/{family}:{rule}+{kind}",
        "family": family,
        "rule": rule,
        "kind": kind,
        "method": method,
        "seed": seed,
        "cap": cap,
        "start": f"start of {rule}",
        "seed_instructions": {"first": "Answer the question."},
        "given_instructions": False,
        "reads_feedback": reads_feedback(method, {"fast": {}}),
        "reflector": "a/reflector" if kind == "shown" and searches else None,
        "commit": "0123456789",
        "val_examples": 100,
        "test_examples": 256,
        "val_score_before": 0.2,
        "val_score_after": curve[-1][1],
        "test_score_before": 0.2,
        "test_score_after": test,
        "kl_to_base": curve[-1][2],
        "fast": 60 if searches else 0,
        "slow": 240,
        "eval": 400,
        "steps": 4,
        "cycles": 2,
        "reflection_calls": 6 if searches else 0,
        "seconds": 20.0 if method == "fst" else 10.0,
        "ended": "budget",
        "rounds": 2 if searches else 0,
        "accepted_first": 2 if searches else 0,
        "accepted_later": 0,
        "population": 1.5 if searches else None,
        "mixed": 0.5,
        "instructions": {"first": "Drop the first letter."},
        "curve": curve,
    } | fields


def rows_of(scores, **fields):
    """A row for each method and rule: `{"fst": {"a": .8}}`."""
    return [row(method, test, rule=rule, **fields) for method, tests in scores.items() for rule, test in tests.items()]


def kept(rows, **fields):
    """The content of a kept file."""
    return {"command": "fst lab compare x --out runs/table", "versions": VERSIONS, "rows": rows, **fields}
