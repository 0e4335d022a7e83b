"""Runs FST with one trial's settings after another's, on one policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import (
    EngineError,
    FSTError,
    MetricError,
    Paused,
    ProgramError,
    StorageError,
    TrainingError,
    UserError,
)
from fst_optimizer.task_run import ReflectionLM

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.run.result import CompileResult
    from fst_optimizer.store.metrics import Callback

CAUSES: tuple[tuple[type[FSTError], str], ...] = (
    (EngineError, "engine dead"),
    (TrainingError, "diverged"),
    (MetricError, "metric"),
    (StorageError, "disk"),
    (Paused, "paused by a monitor"),
    (ProgramError, "program"),
    (UserError, "settings"),
)


@dataclass
class TrialRunner:
    """A program with its metric and data, and the policy that all its trials use in turn.

    The policy is kept between trials, so that model and engine are loaded once. Every trial starts from the base.
    """

    name: str
    """In `result.json`: TASK, or the program's class."""
    build_program: Callable[[], dspy.Module]
    """Gives the seed program. Predictors without an LM get the policy's."""
    metric: Callable[..., Any]
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example] | None
    make_policy: Callable[[LoraConfig], Policy]
    reflection_lm: ReflectionLM = lambda _: None
    owns_policy: bool = True
    """Whether the policy is closed after a failure, and made anew; one that was handed in is not."""
    policy: Policy | None = field(default=None, init=False)

    def run(
        self,
        settings: Settings,
        folder: Path,
        callbacks: Sequence[Callback] = (),
        testset: Sequence[dspy.Example] | None = None,
    ) -> CompileResult:
        """One run of FST that starts from the base, whatever was run before.

        After a failure the policy is let go: its engine may be the reason.
        """
        from fst_optimizer.optimizer import FST
        from fst_optimizer.program.lms import give_lm

        try:
            if self.policy is None:
                self.policy = self.make_policy(settings.lora)
            self.policy.start_over(settings.lora, seed=settings.config.seed)
            fst = FST(
                self.metric,
                config=settings.config.complete(),
                reflection_lm=self.reflection_lm(self.policy),
                run_dir=folder,
                callbacks=callbacks,
                progress=False,
                task=self.name,
                testset=testset,
            )
            program = give_lm(self.build_program(), self.policy.lm)
            compiled = fst.compile(program, trainset=self.trainset, valset=self.valset)
            self.policy.start_over()  # versions that are not sampled from any more take memory in the engine
        except BaseException:
            self.close()
            raise
        outcome: CompileResult = compiled.detailed_results
        return outcome

    def close(self) -> None:
        """Let the policy go, and the memory that it holds."""
        policy, self.policy = self.policy, None
        if policy is not None and self.owns_policy:
            policy.close()


def failure_cause(error: BaseException) -> str:
    """A short name for why a trial failed, the same for the same reason.

    An out-of-memory error counts as such wherever in the chain of causes it is.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return "out of memory"
        seen.append(link)
        link = link.__cause__ or link.__context__
    return next((cause for kind, cause in CAUSES if isinstance(error, kind)), type(error).__name__)
