"""Who teaches whom: the program with its long prompt, and the student with a shorter one on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finding import Finding
from fst_optimizer.policy.lm import trainable_policy
from fst_optimizer.program.texts import check_texts, seed_texts
from fst_optimizer.rollout.rerender import UnderTeacher
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.types import Candidate, Texts

if TYPE_CHECKING:
    import dspy

ORIGIN = ("task", "method", "seed", "policy_version")
"""What a distilled run tells of the one that it comes from, as in that one's `result.json`."""


@dataclass(frozen=True)
class Lesson:
    """What is learned from whom."""

    teacher: Candidate
    """The long prompt."""
    student: Candidate
    """The short one."""
    version: int
    """The policy version of both at the start; the teacher's for good."""
    origin: Mapping[str, Any]
    """Where the teacher comes from: `distilled_from` in `result.json`."""

    def under_teacher(self) -> UnderTeacher:
        """Renders the student's calls under the teacher's prompt."""
        return UnderTeacher(self.student.texts, self.teacher.texts)


def origin_of(result: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a teacher comes from, by its run's `result.json` and `config.json`."""
    return {**{name: result.get(name) for name in ORIGIN}, "run_id": config.get("run_id")}


def before_compiling(program: dspy.Module) -> tuple[Mapping[str, str] | None, dict[str, Any]]:
    """What a compiled program's run says of it: its instructions before, and its origin. None: it says nothing."""
    results = getattr(program, "detailed_results", None)
    if results is None:
        return None, {}
    config = read_config(RunFiles(results.run_dir).config)
    return config["program"]["instructions"], origin_of(read_json(RunFiles(results.run_dir).result), config)


def short_texts(
    program: dspy.Module, seed: Texts | None, given: Mapping[str, str] | None, config: FSTConfig, where: str
) -> dict[str, str]:
    """The student's instructions: those that are given, else those of the `seed`.

    A predictor whose calls do not train the policy keeps its own: nothing can be distilled there.

    Raises:
        UserError: a name or a text that is none, nothing to take, or nothing that would change.
    """
    import dspy

    own = seed_texts(program)
    learns = {
        name: config.trains(name) and trainable_policy(predictor.lm or dspy.settings.lm) is not None
        for name, predictor in program.named_predictors()
    }
    named = {} if given is None else check_texts(program, given, where)
    if untrained := [name for name in named if not learns[name]]:
        raise UserError(
            f"{where} names {untrained[0]!r}, whose calls do not train the policy: its instruction cannot be "
            "distilled, leave it out"
        )
    if seed is None and (missing := [name for name in own if learns[name] and name not in named]):
        raise UserError(
            f"instructions says nothing of {', '.join(missing)}, and the program does not say what stood there before "
            "it was compiled: give an instruction for each"
        )
    before = seed or {}
    short = {name: named.get(name, before.get(name, text)) if learns[name] else text for name, text in own.items()}
    if short == own:
        raise UserError(
            "the program has the very instructions that it should be distilled to: there is no long prompt to do "
            "without; give shorter ones (--instructions, instructions=)"
        )
    return short


def rendering(under_teacher: UnderTeacher) -> list[Finding]:
    """A finding for each predictor whose calls could not be rendered under the teacher's prompt."""
    return [Finding("fail", "teacher", unrendered(name, why)) for name, why in under_teacher.problems.items()]


def unrendered(predictor: str, why: str) -> str:
    """What to say of a predictor whose calls cannot be rendered."""
    return (
        f"predictor {predictor!r} cannot be distilled, as {why}: what its teacher would have been asked is unknown. "
        f"Let dspy alone make its prompt, or set predictors.{predictor}=evolve, with which it keeps its instruction"
    )
