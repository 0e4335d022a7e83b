"""Whether a distilled program is good enough to take the place of the one with the long prompt. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from fst_optimizer.config.distill import DistillConfig

ROUNDING = 1e-9


@dataclass(frozen=True)
class Measured:
    """Scores on the validation set, and entropies in nats a token on its first examples."""

    before: float
    """The student's, before anything was learned: the teacher's weights under the short prompt."""
    after: float
    teacher: float
    entropy: float
    teacher_entropy: float


def needed_score(before: float, teacher: float, keep_gain: float) -> float:
    """The score that keeps such a share of the gain from `before` to `teacher`.

    From .2 to .7, nine tenths of the gain are kept at .65. Without a gain, what was there before is enough.
    """
    return before + keep_gain * max(0.0, teacher - before)


def keeps(before: float, after: float, teacher: float, keep_gain: float) -> bool:
    """Whether `after` is that score, but for rounding."""
    return after > needed_score(before, teacher, keep_gain) - ROUNDING


def refusal(found: Measured, config: DistillConfig) -> str:
    """Why the distilled program is refused, in a sentence; "" where it is not."""
    if not keeps(found.before, found.after, found.teacher, config.keep_gain):
        needed = needed_score(found.before, found.teacher, config.keep_gain)
        return (
            f"without the long prompt the program scores {found.after:.4f} on the validation set ({found.before:.4f} "
            f"before), with it {found.teacher:.4f}; distill.keep_gain={config.keep_gain:g} asks for {needed:.4f}"
        )
    floor = config.min_entropy * found.teacher_entropy
    if found.entropy < floor:
        return (
            f"without the long prompt the program scores {found.after:.4f} on the validation set, with it "
            f"{found.teacher:.4f}, but the policy's entropy is {found.entropy:.4f} nats a token and its teacher's "
            f"{found.teacher_entropy:.4f}; distill.min_entropy={config.min_entropy:g} asks for {floor:.4f}"
        )
    return ""
