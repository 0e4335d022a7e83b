"""How a rollout ended: from what the program raised and what the recorder saw to an `Outcome` and its description."""

from __future__ import annotations

import site
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError

from fst_optimizer.engines.recorder import Recorder
from fst_optimizer.keys import without_secrets
from fst_optimizer.text import as_text, plain, shown
from fst_optimizer.types import Call, Outcome, Raised, Rollout


def outcome_of(error: BaseException | None, recorder: Recorder) -> Outcome:
    """The outcome of a rollout whose program raised `error`, or returned (None)."""
    if error is None:
        return Outcome.OK
    if isinstance(error, AdapterParseError):  # calls refused before it were handled by the program
        place = unparsed_call(error, recorder.calls)
        cut = place is not None and recorder.calls[place].finish_reason == "length"
        return Outcome.TRUNCATED if cut else Outcome.PARSE_ERROR
    if recorder.failure is None and isinstance(error, LMError) and not isinstance(error, ContextWindowExceededError):
        return Outcome.ENGINE_ERROR  # an LM that is not trained could not be reached: not the policy's doing
    return recorder.failure or Outcome.PROGRAM_ERROR


def unparsed_call(error: AdapterParseError, calls: Sequence[Call]) -> int | None:
    """The index of the call whose text did not parse; None when another LM wrote that text.

    It need not be the last call: programs may call in parallel.
    """
    calls = tuple(calls)
    text = str(error.lm_response).strip()
    if not text:
        return len(calls) - 1 if calls else None
    return next((place for place in reversed(range(len(calls))) if text in calls[place].text), None)


def describe_failure(outcome: Outcome, error: BaseException | None) -> str:
    """What went wrong, for people and for the reflector."""
    if isinstance(error, AdapterParseError):
        fields = ", ".join(f"`{name}`" for name in error.signature.output_fields)
        cut = " It was cut at max_tokens." if outcome is Outcome.TRUNCATED else ""
        return f"The answer could not be parsed.{cut} It must give the fields {fields} in the format asked for."
    if error is None:
        return str(outcome)
    return without_secrets(f"{type(error).__name__}: {words_of(error)}".removesuffix(": "))


def raise_ctrl_c(error: BaseException) -> None:
    """Raise it again where it is a Ctrl-C: Python tells that to the main thread, where no program or metric runs."""
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise error


def words_of(error: BaseException) -> str:
    """What an exception says; the code alone says little of a `SystemExit`."""
    return f"it called sys.exit({shown(error.code)})" if isinstance(error, SystemExit) else as_text(error)


def raised_by(error: BaseException) -> Raised:
    """What a program raised, where in its own code, and the lines that people need to find it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _of_a_library(frame.filename)] or frames[-1:]
    # How deep the last call of an endless recursion was is chance: where it was entered is not.
    place = (own[0] if isinstance(error, RecursionError) else own[-1]) if own else None
    shown = [*own[:1], *own[1:][-1:], *([frames[-1]] if frames and frames[-1] not in own else [])]
    lines = [line for part in traceback.format_list(shown) for line in part.splitlines()]
    exits = isinstance(error, SystemExit)
    said = f"SystemExit: {words_of(error)}" if exits else "".join(traceback.format_exception_only(error))
    lines += said.splitlines()[:MOST_LINES]
    return Raised(
        type(error).__name__,
        f"{place.filename}:{place.lineno} in {place.name}" if place else "",
        tuple(plain(without_secrets(line))[:MOST_CHARACTERS] for line in lines),
    )


def raised_alike(rollouts: Sequence[Rollout]) -> Raised | None:
    """What the program raised, where all of these rollouts ended with the same error in the same place; else None."""
    found = {one.raised and str(one.raised) for one in rollouts}
    return rollouts[0].raised if len(found) == 1 else None


def mistake_in_program(raised: Raised, rollouts: int, run_dir: Path | None) -> str:
    """For people: the program raised the same in so many rollouts, which were all that there were.

    `run_dir`: where the run can be resumed. None: there is nothing to resume.
    """
    again = "it again"
    if run_dir is not None:
        again = f"the same command with --resume (in Python: run_dir={str(run_dir)!r}, resume=True)"
    return "\n".join(
        [
            f"the program raised {raised} in all {rollouts} rollouts of the first batch:",
            *raised.lines,
            f"Correct the program and run {again}.",
        ]
    )


MOST_LINES, MOST_CHARACTERS = 4, 300
"""Of an exception's text, and of each line, that are kept: some carry a whole prompt."""


def _of_a_library(filename: str) -> bool:
    """Whether code is Python's own, of an installed package or of this one, rather than the program's."""
    path = Path(filename)
    return (
        filename.startswith("<frozen ")
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        or any(path.is_relative_to(folder) for folder in _library_folders())
    )


@cache
def _library_folders() -> tuple[Path, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return (Path(__file__).parents[1], *map(Path, {*paths, *site.getsitepackages()}))
