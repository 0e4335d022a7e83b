"""Fabricated finished runs, as `fst compile` leaves them, for tests of what reads them."""

import json

from fst_optimizer.config.run import FSTConfig


def write_run(
    folder, method, seed, curve, *, test=(0.1, 0.5), wall_s=10.0, task="programs/letters", lr=1e-3, config=None
):
    """A run directory with this curve of (fast, slow, score, kl)."""
    folder.mkdir(parents=True)
    settings = config or FSTConfig().with_values({"seed": seed, "train.lr": lr}).to_dict() | {"method": method}
    split = {"examples": 100, "sha256": "0"}
    recorded = {
        "task": task,
        "config": settings,
        "policy": {"model": "model"},
        "data": {"train": split, "val": split, "test": split},
        "versions": {"python": "3.11"},
    }
    lines = [
        {
            "kind": "eval",
            "cycle": number,
            "step": number,
            "policy_version": number,
            "time_s": float(number),
            "rollouts": {"fast": fast, "slow": slow, "eval": 100 * number, "reused": 0},
            "split": "val",
            "score": score,
            "kl_to_base": kl,
            "candidate": "abc",
        }
        for number, (fast, slow, score, kl) in enumerate(curve)
    ]
    best = max(lines, key=lambda line: line["score"])
    result = {
        "task": task,
        "method": method,
        "seed": seed,
        "val_score_before": lines[0]["score"],
        "val_score_after": best["score"],
        "test_score_before": test[0],
        "test_score_after": test[1],
        "rollouts": lines[-1]["rollouts"],
        "steps": len(lines) - 1,
        "cycles": len(lines) - 1,
        "reflection_calls": 0,
        "cost_usd": 0.0,
        "wall_s": wall_s,
        "kl_to_base": best["kl_to_base"],
        "policy_version": best["policy_version"],
        "candidate": {"first": "Drop the last letter."},
        "ended": "budget",
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


RL_CURVE = [(0, 0, 0.2, 0.0), (0, 100, 0.5, 0.1), (0, 200, 0.58, 0.4), (0, 300, 0.6, 0.8)]
FST_CURVE = [(0, 0, 0.2, 0.0), (30, 20, 0.57, 0.05), (60, 40, 0.7, 0.1)]
GEPA_CURVE = [(0, 0, 0.2, 0.0), (100, 0, 0.4, 0.0)]

EXTRA = {"command": "fst lab compare programs/letters --out out", "max_rollouts": 300, "sweep": {}}
