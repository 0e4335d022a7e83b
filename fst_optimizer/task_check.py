"""What `fst check` does, without what it prints: everything that would keep `fst compile` from learning, at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fst_optimizer.config.overrides import base_config, settled
from fst_optimizer.errors import FSTError
from fst_optimizer.finding import Finding
from fst_optimizer.keys import without_secrets
from fst_optimizer.task_run import (
    ReflectionLM,
    RunPlan,
    RunRequest,
    check_engine,
    given_settings,
    make_policy,
    reflection_lm_of,
    reflection_name,
)
from fst_optimizer.tasks import Task, load_task

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy

T = TypeVar("T")


@dataclass
class Steps:
    """Does one thing after another, and keeps what was found; a thing that fails does not keep the others back."""

    findings: list[Finding] = field(default_factory=list)

    def __call__(self, name: str, do: Callable[[], T], told: Callable[[T], str] | None = None) -> T | None:
        """What `do` returns; None, and a `fail`, where it raises. `told`: what an `ok` says of the value."""
        try:
            value = do()
        except FSTError as error:
            self.findings.append(Finding("fail", name, str(error)))
        except Exception as error:  # the task's own code
            self.findings.append(Finding("fail", name, without_secrets(f"{type(error).__name__}: {error}")))
        else:
            if told is not None:
                self.findings.append(Finding("ok", name, told(value)))
            return value
        return None

    def failed(self) -> list[str]:
        """Names of what failed, each once."""
        return list(dict.fromkeys(one.name for one in self.findings if one.level == "fail"))


@dataclass(frozen=True)
class Loaded:
    """The parts of a task that were found; None where one could not be had."""

    plan: RunPlan | None = None
    train: list[dspy.Example] | None = None
    val: list[dspy.Example] | None = None
    test: list[dspy.Example] | None = None
    program: dspy.Module | None = None
    reflection_lm: ReflectionLM | None = None


def check_task(request: RunRequest, run_dir: Path | None = None) -> list[Finding]:
    """Everything that `fst compile` would be refused for, or warn of. Nothing is written.

    Args:
        request: As of `fst compile`; its own `run_dir` is not looked at.
        run_dir: Where the run would go. None: not said.
    """
    step = Steps()
    with tempfile.TemporaryDirectory(prefix="fst-check-") as folder:  # for the log of a vLLM server
        request = replace(request, run_dir=Path(folder), resume=False)
        step("engine", lambda: check_engine(request))
        found = _load(step, request)
        plan = found.plan
        policy = step("model", lambda: make_policy(request, plan), repr) if plan and not step.failed() else None
        if policy is None:
            _without_rollouts(step, request, found, run_dir)
        else:
            with closing(policy):
                _dry_run(step, request, found, policy, run_dir)
    return step.findings


def _load(step: Steps, request: RunRequest) -> Loaded:
    from fst_optimizer.data import check_examples
    from fst_optimizer.program.student import check_program, check_roles
    from fst_optimizer.program.texts import seed_texts

    task: Task | None = step("task", lambda: load_task(request.task), lambda one: one.name)
    own = step("settings", task.config) if task else None
    settings = step(
        "settings",
        lambda: settled(base_config(own, request.auto), *given_settings(request)),
        lambda one: f"method {one.config.method}, seed {one.config.seed}",
    )
    if task is None:
        return Loaded()
    data = {split: step("data", partial(task.load, split, size)) for split, size in asdict(request.sizes).items()}
    train, val = data["train"], data["val"]
    if train is not None and val is not None:
        counts = ", ".join(f"{len(examples)} {split}" for split, examples in data.items() if examples is not None)
        step("data", lambda: check_examples(train, val), lambda _: counts)
    program = step(
        "student",
        lambda: check_program(task.build_program()),
        lambda one: f"{type(one).__name__} with predictors {', '.join(seed_texts(one))}",
    )
    plan = RunPlan(task, settings or settled(base_config(None, None)), request.sizes, None)
    reflection_lm = step("reflection", lambda: reflection_lm_of(request, plan))
    if settings is None:
        return Loaded(None, **data, program=program, reflection_lm=reflection_lm)
    if program is not None:
        step("student", lambda: check_roles(seed_texts(program), settings.config))
    return Loaded(plan, **data, program=program, reflection_lm=reflection_lm)


def _without_rollouts(step: Steps, request: RunRequest, found: Loaded, run_dir: Path | None) -> None:
    """What can be checked of a run whose student cannot be run."""
    from fst_optimizer.dry_run import check_budget, check_reflection, check_run_dir
    from fst_optimizer.evolve.reflect import LMReflector
    from fst_optimizer.evolve.reflection_lm import POLICY
    from fst_optimizer.planned import RunSizes

    why = ", ".join(step.failed())
    step.findings.extend(filter(None, [check_run_dir(run_dir)]))
    if found.plan and found.train and found.val:
        sizes = RunSizes(train=len(found.train), val=len(found.val))
        config = found.plan.settings.config.complete()
        step.findings.append(check_budget(config, sizes))
        name = reflection_name(request, found.plan)
        if found.reflection_lm and name not in (None, POLICY):
            lm = found.reflection_lm(None)  # type: ignore[arg-type]  # none but the policy's own base looks at it
            reflector = LMReflector(lm, config.budget.prices)
            step.findings.extend(filter(None, [check_reflection(config, sizes, reflector)]))
    step.findings.append(Finding("warn", "rollouts", f"not checked, as this failed: {why}"))


def _dry_run(step: Steps, request: RunRequest, found: Loaded, policy: Policy, run_dir: Path | None) -> None:
    from fst_optimizer.optimizer import FST
    from fst_optimizer.program.lms import give_lm

    plan, program = found.plan, found.program
    assert plan and program and found.train and found.reflection_lm, "what is missing has failed"
    train, reflection_lm = found.train, found.reflection_lm

    def tried() -> list[Finding]:
        fst = FST(
            plan.task.metric,
            config=plan.settings.config.complete(),
            run_dir=run_dir,
            progress=False,
            task=request.task,
            testset=found.test,
            reflection_lm=reflection_lm(policy),
        )
        return list(fst.dry_run(give_lm(program, policy.lm), trainset=train, valset=found.val).findings)

    step.findings.extend(step("student", tried) or [])
