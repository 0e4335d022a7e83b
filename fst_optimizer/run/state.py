"""What a run knows between two cycles, and its one checkpoint.

A cycle takes a `State` and returns the next. `commit` writes everything that the state names first (adapters,
optimizer) and `state.json` last, atomically: a crash leaves the previous state or the next one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.run.files import RunFiles, read_json, write_json
from fst_optimizer.types import Candidate, Population, RolloutCounts, Usage

if TYPE_CHECKING:
    from fst_optimizer.policy import Policy
    from fst_optimizer.train.trainer import Trainer

FORMAT = 1


@dataclass(frozen=True)
class Best:
    """The best (candidate, policy version) pair on the validation set so far."""

    candidate: Candidate
    policy_version: int
    score: float
    kl_to_base: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As written in `state.json`."""
        return {
            "candidate": self.candidate.to_json(),
            "policy_version": self.policy_version,
            "score": self.score,
            "kl_to_base": self.kl_to_base,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Best:
        """The inverse of `to_json`."""
        return cls(Candidate.from_json(data["candidate"]), data["policy_version"], data["score"], data["kl_to_base"])


@dataclass(frozen=True)
class ValidationScore:
    """What a candidate reached on the validation set at one policy version."""

    policy_version: int
    score: float
    kl_to_base: float
    failed: int
    """Rollouts whose outcome was not `ok`."""
    rollouts: int
    """Rollouts that it took."""


@dataclass(frozen=True)
class State:
    """A run between two cycles."""

    population: Population
    best: Best
    cycle: int = 0
    """Cycles done."""
    step: int = 0
    """Slow steps done, all cycles."""
    batch: int = 0
    """Batches of the data order used: what the next cycle starts from."""
    policy_version: int = 0
    """The newest version: what the next rollouts are sampled from."""
    rollouts: RolloutCounts = field(default_factory=RolloutCounts)
    reflection_calls: int = 0
    reflection_cost_usd: float | None = 0.0
    """None once a price was unknown."""
    usage: Mapping[str, Usage] = field(default_factory=dict)
    """Model -> what the rollouts asked of LMs that are not trained."""
    validated: Mapping[str, ValidationScore] = field(default_factory=dict)
    """Candidate id -> its last score on the validation set."""
    tokens: int = 0
    """Sampled from the policy, evaluations included."""
    val_score_before: float = 0.0
    test_score_before: float | None = None
    """Of the seed candidate at the start version. None without a test set."""
    ended: str = ""
    """Why the run is over: `done`, `budget` or `stopped`. Empty while it is not."""
    cap: str = ""
    """With `budget`: the setting in `budget` that was reached."""

    def to_json(self) -> dict[str, Any]:
        """As written in `state.json`."""
        return {
            "population": self.population.to_json(),
            "best": self.best.to_json(),
            "cycle": self.cycle,
            "step": self.step,
            "batch": self.batch,
            "policy_version": self.policy_version,
            "rollouts": self.rollouts.to_json(),
            "reflection_calls": self.reflection_calls,
            "reflection_cost_usd": self.reflection_cost_usd,
            "usage": {model: asdict(used) for model, used in self.usage.items()},
            "validated": {name: asdict(score) for name, score in self.validated.items()},
            "tokens": self.tokens,
            "val_score_before": self.val_score_before,
            "test_score_before": self.test_score_before,
            "ended": self.ended,
            "cap": self.cap,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """The inverse of `to_json`."""
        return cls(
            **{
                **data,
                "population": Population.from_json(data["population"]),
                "best": Best.from_json(data["best"]),
                "rollouts": RolloutCounts(**data["rollouts"]),
                "usage": {model: Usage(**used) for model, used in data["usage"].items()},
                "validated": {name: ValidationScore(**score) for name, score in data["validated"].items()},
            }
        )


def commit(
    files: RunFiles, state: State, policy: Policy, trainer: Trainer | None, *, elapsed_s: float, metrics_size: int
) -> None:
    """Make `state` the one that a resume starts from, then drop what no state names any more."""
    from safetensors.torch import save_file

    needed = {version for version in (state.policy_version, state.best.policy_version) if version}
    for version in needed:
        if not files.policy(version).exists():
            policy.save_version(version, files.policy(version))
    folder = files.checkpoint(state.cycle)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained = trainer.state() if trainer else {"tensors": {}, "numbers": {}}
    save_file(
        {name: tensor.contiguous() for name, tensor in trained["tensors"].items()}, folder / "optimizer.safetensors"
    )
    write_json(folder / "trainer.json", trained["numbers"])
    write_json(
        files.state,
        {
            "format": FORMAT,
            "checkpoint": folder.relative_to(files.root).as_posix(),
            "elapsed_s": elapsed_s,
            "metrics_size": metrics_size,
            "state": state.to_json(),
        },
    )
    _drop_all_but(folder.parent, {folder.name})
    _drop_all_but(files.policy(0).parent, {files.policy(version).name for version in needed})
    policy.retire_all_but({*needed, policy.version})


@dataclass(frozen=True)
class Resumed:
    """A checkpoint, read back."""

    state: State
    elapsed_s: float
    metrics_size: int


def restore(files: RunFiles, policy: Policy, trainer: Trainer | None) -> Resumed:
    """Read the last committed state and put policy and trainer back to it.

    Raises:
        UserError: `state.json` is of a newer format.
    """
    from safetensors.torch import load_file

    from fst_optimizer.train.adapters import load_adapter_tensors

    data = read_json(files.state)
    if data.get("format") != FORMAT:
        raise UserError(
            f"{files.state}: format {data.get('format')!r}, this version reads {FORMAT}; resume with the version "
            "of fst_optimizer that wrote it"
        )
    state = State.from_json(data["state"])
    _forget_uncommitted(files, state, policy)
    for version in {state.best.policy_version, state.policy_version} - {0}:
        policy.restore(version, load_adapter_tensors(files.policy(version)))
    version = state.policy_version
    policy.restore(version, load_adapter_tensors(files.policy(version)) if version else None)
    policy.continue_numbers_from(version)
    if trainer:
        folder = files.checkpoint(state.cycle)
        tensors = load_file(folder / "optimizer.safetensors")
        trainer.load_state({"tensors": tensors, "numbers": read_json(folder / "trainer.json")})
    return Resumed(state, data["elapsed_s"], data["metrics_size"])


def _forget_uncommitted(files: RunFiles, state: State, policy: Policy) -> None:
    """Drop what came after the checkpoint, on disk and in memory: its version numbers will be given out again."""
    policy.retire_all_but(())
    named = {state.policy_version, state.best.policy_version}
    _drop_all_but(files.policy(0).parent, {files.policy(version).name for version in named})
    files.rollouts(state.cycle).unlink(missing_ok=True)


def _drop_all_but(folder: Any, keep: set[str]) -> None:
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name not in keep:
                shutil.rmtree(entry, ignore_errors=True)
