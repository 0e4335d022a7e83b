"""Settings of `fst distill` and `FST.distill`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fst_optimizer.config.section import Remedy, Section


class DistillConfig(Section, section="distill"):
    """A prompt into weights: when the result is good enough. Without effect on `compile`."""

    keep_gain: Annotated[float, Remedy("give a share above 0 and at most 1")] = Field(default=0.9, gt=0, le=1)
    """Share of what the evolved prompt gains on the validation set, over the same weights under the shorter prompt,
    that the distilled program must keep. Lower it where the shorter prompt is worth some points to you."""
    min_entropy: Annotated[float, Remedy("give a share of at least 0")] = Field(default=0.5, ge=0)
    """Entropy in nats a token that the distilled policy must have, as a share of its teacher's. Below it, it knows
    a few answers by heart. 0: not looked at."""
    full_vocabulary: bool = True
    """Whether the KL of a token is taken over the whole vocabulary, in chunks. False: by the sampled token alone, which
    is noisier, takes less memory and is wrong with `train.epochs` above 1; a step that does not fit into memory
    otherwise goes on so by itself."""
