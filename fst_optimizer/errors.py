"""What raises, and what is only recorded.

Three kinds of things go wrong, and each is handled in one way:

- **A user's mistake** (a wrong setting, an unusable program, a taken directory) raises `UserError` before
  anything is spent. Its text names the field, the value and the remedy. `ProgramError` is one that only running
  the program shows: it fails in every rollout of the first batch, or of the first cycle.
- **A bad rollout** (an unparsable answer, a cut completion, a failing tool, a timeout) is data: the collector
  records it as the rollout's `Outcome`, and it earns its configured reward. It never raises.
- **A broken part** (the metric, the engine, the trainer, the disk) raises `MetricError`, `EngineError`,
  `TrainingError` or `StorageError`, chained with `from` to its cause and saying what was being done. The run stops; its
  last checkpoint stands. `NotDistilled` is no broken part, but a result that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

from fst_optimizer.keys import without_keys


class FSTError(Exception):
    """Base of everything that this package raises on purpose. No key that is known is in its text."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_keys(one) if isinstance(one, str) else one for one in args))


class UserError(FSTError, ValueError):
    """A mistake in what was passed in; the text says which field, which value, and what to do."""


class ProgramError(UserError):
    """The program fails in every rollout: nothing can be learned. Correct it, and resume the run."""


class MetricError(FSTError):
    """The metric raised; one that returns no finite number is a `UserError`."""


class EngineError(FSTError):
    """The engine could not generate at all (as opposed to one bad completion)."""


class EngineDied(EngineError):
    """The engine broke down for good: the run stops at once, whatever else it was doing."""


class PromptTooLong(EngineError):
    """One prompt plus one new token exceed the model's context: recorded as the rollout's outcome."""


class RetiredVersion(EngineError):
    """A request named a policy version that the engine no longer serves."""


class ReflectionError(FSTError):
    """The reflection LM failed at every call, for a reason that will not pass; the last checkpoint stands."""


class TrainingError(FSTError):
    """The slow step broke, or was skipped too many times in a row."""


class NotDistilled(FSTError):
    """A distilled program is not good enough without its long prompt: none was written."""


class StorageError(FSTError):
    """A file of the run could not be written; the last checkpoint stands."""


class Paused(FSTError):
    """A monitor with `pause` saw what it watches for; the checkpoint is written, and a resume goes on from it."""


class StopRun(Exception):
    """Raised by a callback: the run ends after the phase that is under way, with the best pair so far."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy's second half: the nearest known name if there is one, else all of them."""
    options = sorted(known)
    near = get_close_matches(name, options, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(options)}"


def need_extra(extra: str, *modules: str) -> None:
    """The modules that an extra of this package brings are installed.

    Raises:
        UserError: says how to install them.
    """
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install 'fst-optimizer[{extra}]'")
