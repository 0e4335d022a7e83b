"""What all trials of a study have in common, and one run of FST with a trial's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings
from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import EngineError, FSTError, MetricError, Paused, StorageError, TrainingError, UserError

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.optimizer import CompileResult
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.store.metrics import Callback

CAUSES: tuple[tuple[type[FSTError], str], ...] = (
    (EngineError, "engine dead"),
    (TrainingError, "diverged"),
    (MetricError, "metric"),
    (StorageError, "disk"),
    (Paused, "paused by a monitor"),
    (UserError, "settings"),
)
MEMORY = "out of memory"


@dataclass(frozen=True)
class Work:
    """A program with its metric, data and policy: what a trial's settings are tried on."""

    name: str
    """In `result.json`: TASK, or the program's class."""
    program: Callable[[], dspy.Module]
    """The seed program, its LMs set but for those that the policy takes."""
    metric: Callable[..., Any]
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example] | None
    make_policy: Callable[[LoraConfig], Policy]
    temporary_adapter: bool = False
    """Whether the policy is somebody else's: it is then not closed after a failure, and not made anew."""
    reflection_lm: dspy.LM | None = None


class Desk:
    """A worker's place: one policy, kept from trial to trial, so that model and engine are loaded once.

    Args:
        work: What is tried.
        rank: The largest LoRA rank of any trial: what an engine is started for.
    """

    def __init__(self, work: Work, rank: int) -> None:
        self.work = work
        self.rank = rank
        self.policy: Policy | None = None

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
        try:
            result = self._run(self._fresh_policy(settings), settings, folder, callbacks, testset)
        except BaseException:
            self.clear()
            raise
        return result

    def _run(
        self,
        policy: Policy,
        settings: Settings,
        folder: Path,
        callbacks: Sequence[Callback],
        testset: Sequence[dspy.Example] | None,
    ) -> CompileResult:
        from fst_optimizer.optimizer import FST
        from fst_optimizer.program.lms import give_lm

        fst = FST(
            self.work.metric,
            config=settings.config,
            reflection_lm=self.work.reflection_lm,
            run_dir=folder,
            callbacks=callbacks,
            task=self.work.name,
            testset=testset,
        )
        program = give_lm(self.work.program(), policy.lm)
        compiled = fst.compile(program, trainset=self.work.trainset, valset=self.work.valset)
        outcome: CompileResult = compiled.detailed_results
        policy.start_over()  # a version that nobody samples from any more takes memory in the engine
        return outcome

    def _fresh_policy(self, settings: Settings) -> Policy:
        if self.policy is None:
            self.policy = self.work.make_policy(settings.lora.changed(rank=max(self.rank, settings.lora.rank)))
        self.policy.start_over(settings.lora, seed=settings.config.seed)
        return self.policy

    def clear(self) -> None:
        """Let the policy go, and the memory that it holds."""
        if self.policy is not None:
            policy, self.policy = self.policy, None
            if not self.work.temporary_adapter:
                policy.close()


def failure_cause(error: BaseException) -> str:
    """One short word for why a trial failed, the same for the same reason.

    An out-of-memory error counts as such wherever in the chain it is.
    """
    chain = list(_chain(error))
    if any(isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" for one in chain):
        return MEMORY
    for kind, cause in CAUSES:
        if isinstance(error, kind):
            return cause
    return type(error).__name__


def _chain(error: BaseException | None) -> Sequence[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
