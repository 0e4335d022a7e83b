"""Closing tables of the commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.finished.load import KEY_VARIABLE
from fst_optimizer.progress.tables import closing, files_left, number, rich_table

if TYPE_CHECKING:
    from rich.table import Table

    from fst_optimizer.engines.vllm.server import VLLMServer
    from fst_optimizer.finished.score import TestScore


def compiled(result: Mapping[str, Any], run_dir: Path, *, task: str | None, model: str | None) -> list[Table | str]:
    """What a finished run came to, where it is, and what to do with it, for which `task` and `model` must be said."""
    return closing(result, _next_steps(result, run_dir, task, model))


def distilled(result: Mapping[str, Any], run_dir: Path, *, task: str | None, model: str | None) -> list[Table | str]:
    """What a distillation came to: the teacher beside the closing table of any run."""
    tokens, entropy = result["tokens_per_answer"], result["token_entropy"]
    rows = [
        ["validation score", number(result["teacher_score"], 4), number(result["val_score_after"], 4)],
        ["tokens per answer", number(tokens["before"], 1), number(tokens["after"], 1)],
        ["entropy, nats a token", number(entropy["before"], 4), number(entropy["after"], 4)],
    ]
    table = rich_table("", ("", "with the long prompt", "distilled"), rows)
    _, *rest = compiled(result, run_dir, task=task, model=model)
    return [f"distilled: {result['task']}, seed {result['seed']}", table, *rest]


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


def _next_steps(result: Mapping[str, Any], run_dir: Path, task: str | None, model: str | None) -> str:
    said = "".join(f", {name}={value!r}" for name, value in (("task", task), ("model", model)) if value is not None)
    at = "" if model is None else f" --model {shlex.quote(model)}"
    return (
        f"{files_left(run_dir)}\n"
        f"check it  fst eval {shlex.quote(result['task'])} --run-dir {shlex.quote(str(run_dir))}{at}\n"
        f"use it    program = fst_optimizer.load({str(run_dir)!r}{said})"
    )
