"""A task's run from start to end: what `fst compile` and `fst eval` do, without what they print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.overrides import Settings, assignments, base_config, read_settings, settled
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import KEY_VARIABLE, finished
from fst_optimizer.store.files import RunFiles
from fst_optimizer.tasks import Task, load_task

if TYPE_CHECKING:
    from fst_optimizer.engines.vllm.server import OnWait
    from fst_optimizer.finished.score import TestScore
    from fst_optimizer.optimizer import CompileResult
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.store.metrics import Callback


@dataclass(frozen=True)
class Sizes:
    """How many examples of each split are used, the first ones. None: the task's own number."""

    train: int | None = None
    val: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Choices:
    """What `fst compile` was asked for."""

    task: str
    run_dir: Path
    model: str | None = None
    """None: the task's own."""
    engine: str | None = None
    """None: that of the run to resume, or `torch`."""
    url: str | None = None
    """A vLLM server to attach to. None: one is started."""
    auto: str | None = None
    config_file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings from options of their own, e.g. `--seed`."""
    sets: Sequence[str] = ()
    """`NAME=VALUE`, as given to `--set`."""
    sizes: Sizes = Sizes()
    resume: bool = False
    allow_changes: bool = False
    """Resume although something is not as it was."""


@dataclass(frozen=True)
class Plan:
    """The same, looked up and checked."""

    task: Task
    settings: Settings
    sizes: Sizes
    recorded: Mapping[str, Any] | None
    """`config.json` of the run to resume."""


def plan_run(choices: Choices) -> Plan:
    """Find the task and settle the settings. A run that is resumed keeps its own, under what is given again.

    Raises:
        UserError: no such task or setting, or a value that does not fit.
    """
    task = load_task(choices.task)
    path = RunFiles(choices.run_dir).config
    recorded = read_config(path) if choices.resume and path.exists() else None
    file = read_settings(choices.config_file) if choices.config_file else {}
    given = (file, choices.flags, assignments(choices.sets))
    if recorded is None:
        settings = settled(base_config(task.config(), choices.auto), *given)
    else:
        settings = settled(FSTConfig(), read_settings(path), *given)
        _check_same_policy(settled(FSTConfig(), read_settings(path)), settings)
    return Plan(task, settings, _kept(choices.sizes, recorded), recorded)


def compile_task(choices: Choices, plan: Plan, callbacks: Sequence[Callback] = ()) -> CompileResult:
    """Run FST on the task; its test scores are part of the result."""
    from fst_optimizer.optimizer import FST
    from fst_optimizer.program.lms import give_lm

    task, sizes = plan.task, plan.sizes
    policy = make_policy(choices, plan, telling(callbacks))
    try:
        program = give_lm(task.build_program(), policy.lm)
        fst = FST(
            task.metric,
            config=plan.settings.config,
            run_dir=choices.run_dir,
            resume=choices.resume,
            allow_changes=choices.allow_changes,
            callbacks=callbacks,
            task=choices.task,
            testset=task.load("test", sizes.test),
        )
        compiled = fst.compile(program, trainset=task.load("train", sizes.train), valset=task.load("val", sizes.val))
    finally:
        policy.close()
    outcome: CompileResult = compiled.detailed_results
    return outcome


def make_policy(choices: Choices, plan: Plan, on_wait: OnWait | None = None) -> Policy:
    """The policy to train: the recorded one when a run is resumed, else of `--model` or the task's own model."""
    from fst_optimizer.finished.load import load_policy
    from fst_optimizer.policy.policy import Policy

    engine = choices.engine or (plan.recorded or {}).get("policy", {}).get("engine", "torch")
    if choices.url is not None and engine != "vllm":
        raise UserError(f"--url is {choices.url!r} and the engine is {engine!r}: add --engine vllm")
    vllm: dict[str, Any] = {}
    if engine == "vllm":
        config = plan.settings.vllm
        if config.log_file is None:
            config = config.changed(log_file=str(choices.run_dir / "vllm.log"))
        vllm = {"url": choices.url, "api_key": os.environ.get(KEY_VARIABLE), "vllm": config, "on_wait": on_wait}
    if plan.recorded is not None:
        return load_policy(RunFiles(choices.run_dir), dict(plan.recorded), 0, choices.model, engine, **vllm)
    model = choices.model or plan.task.model()
    if model is None:
        raise UserError(f"model is None: the task {choices.task!r} has no model of its own; give --model")
    settings = plan.settings
    return Policy(
        model,
        engine=engine,
        lora=settings.lora,
        seed=settings.config.seed,
        max_tokens=settings.policy.max_tokens,
        **vllm,
    )


def telling(callbacks: Sequence[Callback]) -> OnWait:
    """Passes on how long a vLLM server has been starting, as a progress event."""

    def tell(waited_s: float, log_line: str) -> None:
        for callback in callbacks:
            callback({"kind": "waiting", "seconds": waited_s, "text": log_line})

    return tell


def eval_task(
    name: str,
    run_dir: Path,
    *,
    test_size: int | None = None,
    model: str | None = None,
    engine: str | None = None,
    on_progress: Any = None,
) -> TestScore:
    """Score a finished run on the task's test set, by default as many examples as the run used.

    Args:
        name: The task; another variant than the run's own scores the program on that.
        run_dir: What `fst compile --run-dir` left.
        test_size: How many examples. None: as many as the run.
        model: Where the base model is now. None: where it was.
        engine: What generates. None: what the run used.
        on_progress: A callback for progress events.
    """
    from fst_optimizer.finished.score import score_run

    _, recorded = finished(run_dir)
    task = load_task(name)
    if test_size is None:
        test_size = (recorded["data"].get("test") or {}).get("examples")
    examples = task.load("test", test_size)
    done = 0

    def count(_: object) -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress({"kind": "progress", "phase": "test", "done": done, "total": len(examples)})

    return score_run(run_dir, examples, task.metric, model=model, engine=engine, on_rollout=count)


def _check_same_policy(before: Settings, now: Settings) -> None:
    """The optimizer compares the rest; what the policy was made of cannot change under a run either."""
    for section in ("lora", "policy"):  # how vLLM is run may change
        if getattr(before, section) != getattr(now, section):
            raise UserError(
                f"the run to resume was started with {getattr(before, section)}, not {getattr(now, section)}: leave "
                f"the {section} settings out, or start another run"
            )


def _kept(sizes: Sizes, recorded: Mapping[str, Any] | None) -> Sizes:
    """The sizes of the run to resume, where none are given."""
    data = (recorded or {}).get("data", {})

    def size(split: str) -> int | None:
        given: int | None = getattr(sizes, split)
        return given if given is not None else (data.get(split) or {}).get("examples")

    return Sizes(size("train"), size("val"), size("test"))
