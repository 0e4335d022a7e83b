"""How far a step may go, and how much entropy it is asked for: two controllers, and the numbers that they keep.

**Step size** (`train.target_kl`). AdamW's step is its learning rate times a direction, and the KL that a small step
makes grows with the square of its length. So a step that went too far is shortened along its own line, without another
backward pass, and what was kept of it says which share of the learning rate the next step begins with.

**Entropy** (`train.entropy_floor`). Below the floor a bonus is on and grows from step to step; from the floor on it is
off, and what was needed fades, so that it need not be found again when the floor is crossed twice.

Source: trust regions by a line search as in TRPO (arXiv 1502.05477), and a weight that follows a target as in SAC
(arXiv 1812.05905); ours are multiplicative, so that one rule serves models of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from fst_optimizer.model.lora import restore, snapshot
from fst_optimizer.types import TrainRow

OVERSHOOT = 1.5
"""A step may make so many times the target before it is shortened: it is aimed at, not kept to the digit."""
SHORTEST, LONGEST = 0.1, 0.9
"""What one shortening may leave of a step."""
SHORTENINGS = 4
"""In one step at most. Each costs a forward pass over the batch."""
SLOWER, FASTER = 0.5, 2.0
"""By how much the share of the learning rate may change from one step to the next."""
LEAST_SCALE = 1e-4
"""Of the learning rate: from so little it is back at the whole in 14 steps."""

FIRST_BONUS, MOST_BONUS = 1e-3, 1.0
"""Weight of the entropy bonus when it is switched on, and at most."""
BONUS_STEP = 1.25
"""By how much it grows with each step below the floor, and fades with each one above: tenfold in ten steps."""


@dataclass(frozen=True)
class Pace:
    """What one step leaves to the next. Saved with the optimizer's state."""

    lr_scale: float = 1.0
    """With a target KL: the share of the learning rate that the next step begins with, at most 1."""
    bonus: float = 0.0
    """With an entropy floor: the weight of the bonus that was needed last. 0: none."""


def too_far(kl: float, target: float) -> bool:
    """Whether a step must be shortened. So must one whose KL is not a number."""
    return not kl <= OVERSHOOT * target


def shortened(share: float, kl: float, target: float) -> float:
    """What to try of a step of which `share` made `kl`: what would make the target if KL grew with its square."""
    return share * min(LONGEST, max(SHORTEST, math.sqrt(target / kl))) if kl > 0 else share * SHORTEST


def next_scale(scale: float, share: float, kl: float, target: float) -> float:
    """The share of the learning rate that the next step begins with, after `share` of one at `scale` made `kl`.

    Never above 1: `train.lr` is the highest rate, so that a batch that teaches nothing cannot drive it up.
    """
    wanted = math.sqrt(target / kl) if kl > 0 else FASTER
    return min(1.0, max(LEAST_SCALE, scale * share * min(FASTER, max(SLOWER, wanted))))


def next_bonus(bonus: float, entropy: float, floor: float) -> float:
    """The weight of the entropy bonus after a batch of this entropy. It is in force only below the floor."""
    if entropy < floor:
        return min(MOST_BONUS, max(FIRST_BONUS, bonus * BONUS_STEP))
    faded = bonus / BONUS_STEP
    return faded if faded >= FIRST_BONUS else 0.0


def sampled_entropy(rows: Sequence[TrainRow]) -> float:
    """Mean of -log pi over the sampled tokens, in nats: an estimate of their entropy without a forward pass.

    So a batch decides on its own bonus, and one whose groups are all flat costs nothing to look at.
    """
    tokens = sum(len(row.call.logprobs) for row in rows)
    return -math.fsum(logprob for row in rows for logprob in row.call.logprobs) / max(1, tokens)


def hold_back(
    model: PeftModel, start: Mapping[str, Tensor], measure: Callable[[], float], target: float
) -> tuple[float, float]:
    """Shorten the step from `start` to the trained adapter as it stands until `measure()` is about the target KL.

    Returns the share of the step that is kept, and its KL, which is still more than the target only where so many
    shortenings did not suffice. Where it is not a number, nothing is kept.
    """
    end, share = snapshot(model), 1.0
    kl = measure()
    for _ in range(SHORTENINGS):
        if not too_far(kl, target):
            break
        share = shortened(share, kl, target)
        restore(model, {name: torch.lerp(start[name], tensor, share) for name, tensor in end.items()})
        kl = measure()
    if not math.isfinite(kl):
        restore(model, start)
        return 0.0, kl
    return share, kl
