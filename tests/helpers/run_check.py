"""Whether a finished run directory holds what the design says: files, fields, and counts that agree."""

import json
import math

COUNTS = ("fast", "slow", "eval", "reused")
NUMBERS = ("val_score_before", "val_score_after", "test_score_before", "test_score_after", "wall_s", "kl_to_base")
WHOLE = ("seed", "steps", "cycles", "reflection_calls", "policy_version")
LINE = ("kind", "cycle", "step", "policy_version", "time_s", "rollouts")
BY_KIND = {
    "fast": ("proposals", "accepted", "population", "best_score"),
    "step": ("reward_mean", "groups", "flat_groups", "calls", "tokens", "updated"),
    "eval": ("split", "score", "kl_to_base", "candidate"),
}


def assert_as_designed(run):
    """Every file and field is there, and the numbers agree with each other."""
    for name in ("config.json", "state.json", "metrics.jsonl", "program.json", "result.json"):
        assert (run / name).is_file(), name
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _check_result(result)
    _check_lines(lines, result)
    if result["policy_version"]:
        assert (run / "policy" / f"policy-{result['policy_version']:06d}").is_dir()
    assert not [path for path in run.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def _check_result(result):
    assert all(isinstance(result[name], int) for name in WHOLE)
    tested = result["test_score_after"] is not None
    numbers = {name: result[name] for name in NUMBERS if tested or not name.startswith("test_")}
    assert all(math.isfinite(value) for value in numbers.values())
    assert all(0 <= value <= 1 for name, value in numbers.items() if "score" in name)
    assert result["method"] in ("fst", "rl", "gepa", "sequential", "once")
    assert result["ended"] in ("done", "budget", "stopped")
    assert isinstance(result["task"], str) and isinstance(result["candidate"], dict)
    assert "cost_usd" in result


def _check_lines(lines, result):
    clock, counts = 0.0, dict.fromkeys(COUNTS, 0)
    for line in lines:
        assert all(name in line for name in (*LINE, *BY_KIND[line["kind"]])), line
        assert line["time_s"] >= clock
        assert all(line["rollouts"][name] >= counts[name] for name in COUNTS)
        clock, counts = line["time_s"], line["rollouts"]
    assert all(result["rollouts"][name] >= counts[name] for name in COUNTS)
    assert sum(line["kind"] == "eval" and line["split"] == "val" for line in lines) >= 2
    steps = [(line["cycle"], line["step"]) for line in lines if line["kind"] == "step"]
    assert len(steps) == len(set(steps)) == result["steps"]
