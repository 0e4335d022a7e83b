"""What is watched while a run goes on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fst_optimizer.config.section import Section

MonitorAction = Literal["off", "warn", "pause"]


class MonitorsConfig(Section, section="monitors"):
    """What is watched while a run goes on. `warn` says so once; `pause` also ends the process, with a checkpoint."""

    kl: MonitorAction = "warn"
    """The policy is far from its base."""
    kl_max: float = Field(default=1.0, ge=0)
    """KL to the base, in nats a token, beyond which that is so."""
    entropy: MonitorAction = "warn"
    """The policy gives nearly the same answer every time, and its reward is low."""
    entropy_min: float = Field(default=0.01, ge=0)
    """Entropy, in nats a token, below which that is so."""
    entropy_unless_reward: float = Field(default=0.9, ge=0)
    """Mean reward from which on low entropy is fine."""
    format: MonitorAction = "warn"
    """Many rollouts cannot be parsed, or are cut."""
    format_max: float = Field(default=0.5, ge=0)
    """Share of a step's rollouts beyond which they are many."""
    steps: int = Field(default=3, ge=1)
    """Steps in a row that `entropy` and `format` must see it."""
    flat: MonitorAction = "warn"
    """Every group has one reward only, so that nothing is learned."""
    flat_batches: int = Field(default=5, ge=1)
    """Batches in a row that `flat` must see it."""
    lost: MonitorAction = "warn"
    """A fast round or a validation leaves many examples out, as the engine or another LM failed on them, and again."""
    lost_max: float = Field(default=0.1, ge=0)
    """Share of its examples beyond which they are many."""
    falling: MonitorAction = "warn"
    """The validation score falls while the training reward rises."""
    falling_evals: int = Field(default=3, ge=1)
    """Evaluations in a row that `falling` must see it."""
