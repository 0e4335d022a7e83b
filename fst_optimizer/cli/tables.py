"""Closing tables of the commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.cli.console import say
from fst_optimizer.finished.load import KEY_VARIABLE
from fst_optimizer.lab.tables import number, rich_table
from fst_optimizer.text import clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fst_optimizer.engines.vllm.server import VLLMServer
    from fst_optimizer.finished.score import TestScore


def show(console: Console, parts: Iterable[Table | str]) -> None:
    """Print tables and text."""
    for part in parts:
        if isinstance(part, str):
            say(console, part)
        else:
            console.print(part)


def closing(result: Mapping[str, Any], run_dir: Path) -> list[Table | str]:
    """What a finished run came to, where it is, and what to do with it."""
    texts = [[name, text] for name, text in result["candidate"].items()]
    instructions = rich_table("", ("predictor", "learned instruction"), texts)
    return [_scores(result), _costs(result), instructions, _next_steps(result, run_dir)]


def evaluation(name: str, run_dir: Path, score: TestScore) -> list[Table | str]:
    """The test score now beside the recorded one."""
    now, recorded = score.evaluation.score, score.recorded
    comparable = recorded is not None and score.same_examples
    row = [
        f"{now:.4f}",
        number(recorded, 4),
        f"{now - recorded:+.4f}" if recorded is not None and comparable else "-",
        str(len(score.evaluation.scores)),
        str(score.evaluation.failed),
    ]
    if comparable:
        note = "the recorded score, exactly" if now == recorded else "not the recorded score"
    else:
        note = "the run recorded no test score" if recorded is None else "other examples than the recorded score"
    table = rich_table("", ("test score", "recorded", "difference", "examples", "failed"), [row])
    return [table, f"{run_dir} on {name}: {note}."]


def served(server: VLLMServer, name: str, *, key_given: bool) -> str:
    """Where a finished run's policy is served, and how to ask it."""
    key = f"${KEY_VARIABLE}" if key_given else server.api_key
    return (
        f"serving   {name} at {server.url}/v1, until Ctrl-C\n"
        f"key       {f'that of {KEY_VARIABLE}' if key_given else server.api_key}\n"
        f"log       {server.log_file}\n"
        f"try it    curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-H "Authorization: Bearer {key}" '
        f"""-d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'\n"""
        f'in dspy   dspy.LM("hosted_vllm/{name}", api_base="{server.url}/v1", api_key=...)'
    )


def _scores(result: Mapping[str, Any]) -> Table:
    rows = []
    for split, label in (("val", "validation"), ("test", "test")):
        before, after = result[f"{split}_score_before"], result[f"{split}_score_after"]
        gain = f"{after - before:+.3f}" if before is not None and after is not None else "-"
        rows.append([label, number(before, 4), number(after, 4), gain])
    title = f"{result['method']} on {result['task']}, seed {result['seed']}"
    return rich_table(title, ("", "before", "after", "gain"), rows)


def _costs(result: Mapping[str, Any]) -> str:
    counts = result["rollouts"]
    rollouts = "  ".join(f"{name} {counts[name]}" for name in ("fast", "slow", "eval", "reused"))
    cost = result["cost_usd"]
    money = "unknown price" if cost is None else f"${cost:.4f}"
    return (
        f"rollouts  {rollouts}\n"
        f"cycles {result['cycles']}  steps {result['steps']}  reflection calls {result['reflection_calls']} ({money})  "
        f"time {clock(result['wall_s'])}  ended: {result['ended']}\n"
        f"best pair at policy version {result['policy_version']}, KL to base {result['kl_to_base']:.4f} nats a token"
    )


def _next_steps(result: Mapping[str, Any], run_dir: Path) -> str:
    return (
        f"files     {run_dir}/ (result.json, metrics.jsonl, program.json, policy/)\n"
        f"check it  fst eval {result['task']} --run-dir {run_dir}\n"
        f"use it    program = fst_optimizer.load({str(run_dir)!r})"
    )
